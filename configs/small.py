# The default: a model of about a million parameters, trained for four minutes (on two CPU cores) on the docstrings of
# the packages it needs. bench/LOG.md lists alternatives that did worse.
data = dict(corpus="docstrings", tokenizer="bpe")
model = dict(n_layer=2, n_head=3, d_model=192, d_ff=192, seq_len=512, init="look-back")
seconds = 240
batch_size = 4
lr = 1e-2
muon_lr = 1e-2
beta1 = 0.8
beta2 = 0.995
eval_every = 1000
sample_every = 1000
