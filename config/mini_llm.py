# x
dataset = "stdlib_bpe8000"
vocab_size = 8000
n_layer = 6
n_head = 8
n_embd = 512
n_hidden = 2048
mlp = "gelu"
