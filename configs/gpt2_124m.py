# The size of GPT-2 small on FineWeb-Edu, with half a million tokens per step. For one GPU with 24 GB or more.
data = dict(corpus="fineweb-edu", tokenizer="gpt2", max_tokens=3_000_000_000)
model = dict(n_layer=12, n_head=12, d_model=768, seq_len=1024)
tokens = 2_500_000_000
batch_size = 512
micro_batch = 16
lr = 1e-3
save_every = 250
