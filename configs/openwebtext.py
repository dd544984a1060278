# The model of tinystories.py on OpenWebText, with a vocabulary of 32,000. For one GPU; the download is 24 GB.
data = dict(corpus="openwebtext", tokenizer="bpe", vocab_size=32_000)
model = dict(n_layer=8, n_head=8, d_model=512, d_ff=1408, seq_len=256)
tokens = 1_310_720_000
batch_size = 128
save_every = 500
