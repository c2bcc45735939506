# What hybrids are for: a context of 2,048 bytes on a CPU. The cost of a token hardly grows with the context, and the
# state of a Mamba layer, in which it decodes, does not grow at all.
dataset = "shakespeare_byte"
prepare = "prepare/shakespeare.py --tokenizer=byte"

arch = "hybrid_ssm"
n_layer = 6
attn_layer_period = 6
attn_layer_offset = 3
n_head = 4
n_kv_head = 1
n_embd = 192
block_size = 2048

batch_size = 1
lr = 0.02
rest_lr = 0.01
momentum = 0.9
max_steps = 2000
eval_every = 500
prompts = ("To be", "The king")
