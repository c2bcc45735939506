dataset = "shakespeare_char"
prepare = "prepare/shakespeare.py --tokenizer=char"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 24
max_steps = 250
eval_every = 250
warmup_steps = 10
