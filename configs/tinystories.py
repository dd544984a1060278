# A 31M-parameter model on TinyStories, with the vocabulary size and token count of Stanford's CS336. For one GPU.
data = dict(corpus="tinystories", tokenizer="bpe", vocab_size=10_000)
model = dict(n_layer=8, n_head=8, d_model=512, d_ff=1408, seq_len=256)
tokens = 327_680_000
batch_size = 128
save_every = 500
