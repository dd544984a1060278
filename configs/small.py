# The default: a model of about a million parameters on the documentation of the Python around it, in four minutes on
# two cores. No network, no GPU.
data = dict(corpus="docstrings", tokenizer="bpe", vocab_size=2048)
model = dict(n_layer=3, n_head=4, d_model=128, seq_len=128)
seconds = 240
batch_size = 16
