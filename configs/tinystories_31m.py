# 31M parameters on TinyStories, five minutes: what `python train.py` takes on a GPU such as an H100.
data = dict(corpus="tinystories", tokenizer="bpe", vocab_size=10_000, max_tokens=100_000_000)
model = dict(n_layer=8, n_head=8, d_model=512, d_ff=1408, seq_len=512)
seconds = 300
batch_size = 128
eval_every = 500
save_every = 500
