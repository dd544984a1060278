# 4.3M parameters on the docstrings of the required packages, without a download: what `python train.py` takes on a GPU
# without TinyStories. The text has under 3M tokens: seven epochs, after which so small a model does not overfit yet.
data = dict(corpus="docstrings", tokenizer="bpe")
model = dict(n_layer=4, n_head=4, d_model=256, d_ff=704, seq_len=512, init="look-back")
tokens = 20_000_000
batch_size = 16
