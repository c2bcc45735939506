# What hybrids are for: nexus_bytes.py with a context of 2,048 bytes instead of 128, at the same cost per byte.
dataset = "shakespeare_byte"
prepare = "prepare/shakespeare.py --tokenizer=byte"

arch = "hybrid_ssm"
n_layer = 6
attn_layer_period = 6
attn_layer_offset = 3
n_head = 8
n_kv_head = 2
n_embd = 256
n_hidden = 1024
block_size = 2048

batch_size = 1
lr = 0.02
momentum = 0.9
rest_lr = 0.01
schedule = "wsd"
decay_frac = 0.5
min_lr = 0.02
max_steps = 600
eval_every = 200
prompts = ("To be", "The king", "What light")
