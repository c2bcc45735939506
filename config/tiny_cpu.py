# The first run: ternary weights (BitNet b1.58), 3.7 M parameters on Shakespeare, 4,096 words.
dataset = "shakespeare_bpe4096"
prepare = "prepare/shakespeare.py --tokenizer=bpe --vocab_size=4096"

arch = "ternary"
n_layer = 4
n_head = 4
n_embd = 256
n_hidden = 512
block_size = 256

batch_size = 16
lr = 0.08
momentum = 0.9
rest_lr = 0.01
schedule = "wsd"
decay_frac = 0.4
max_steps = 600
eval_every = 150
prompts = ("To be", "The king")
