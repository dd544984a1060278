# The defaults of an experiment's trials; suites and scales override them.
data = dict(corpus="docstrings", tokenizer="bpe", vocab_size=2048)
model = dict(n_layer=3, n_head=2, d_model=128, seq_len=128)
seconds = 240
batch_size = 16
micro_batch = 0
lr = 1e-2
sample_every = 1000
