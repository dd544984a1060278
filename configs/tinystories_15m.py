# 15M parameters on TinyStories, five minutes: the smallest that `python train.py` takes on a GPU.
data = dict(corpus="tinystories", tokenizer="bpe", vocab_size=10_000, max_tokens=100_000_000)
model = dict(n_layer=6, n_head=6, d_model=384, d_ff=1088, seq_len=512)
seconds = 300
batch_size = 64
