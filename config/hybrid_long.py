# What hybrids are for: nexus_bytes.py with a context of 2,048 bytes instead of 128, at hardly more cost per byte.
# 2 cores, tinyshakespeare: 1.504 nats per byte in 5 minutes. A byte of training costs 0.86 of what it costs a dense
# model at this context and half at 8,192; after 8,000 bytes it decodes 221 bytes/s, the dense model 166
# (bench/hybrid.py).
# Export: GraniteMoeHybrid in transformers, llama.cpp, ONNX Runtime and transformers.js.
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
