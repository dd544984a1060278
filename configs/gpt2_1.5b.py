# The size of GPT-2 XL on FineWeb-Edu, with a million tokens per step and the rates of llm.c's GPT-2 1558M. For eight
# GPUs with 80 GB: `python -m model.plan --config gpt2_1.5b.py` predicts what it takes. The text is a large download.
data = dict(corpus="hub:HuggingFaceFW/fineweb-edu:sample-100BT", tokenizer="gpt2", max_tokens=33_000_000_000)
model = dict(n_layer=48, n_head=25, d_model=1600, seq_len=1024)
tokens = 32_000_000_000
batch_size = 1024
micro_batch = "auto"
optimizer = "adamw"
lr = 6e-4
warmup = 700.0
schedule = "cosine"
final_lr = 0.1
save_every = 500
