# The shape of the published "Nexus" run, trained for real: bytes of Shakespeare, 6 layers, one of them attention.
# 2 cores, tinyshakespeare: validation loss 1.87 nats per byte in 37 s, 1.505 (2.17 bits) in 4 minutes. Counting
# trigrams gives 2.05 nats, the published run reached 2.63 in 87 minutes. With --ssm=mamba1, the kind that Jamba has:
# 1.500, in 1.7 times the time per step.
# Export: GraniteMoeHybrid (with --ssm=mamba1 Jamba) in transformers, llama.cpp, ONNX Runtime and transformers.js.
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
block_size = 128

batch_size = 16
lr = 0.02
momentum = 0.9
rest_lr = 0.01
schedule = "wsd"
decay_frac = 0.5
min_lr = 0.02
max_steps = 600
eval_every = 100
prompts = ("To be", "The king", "What light")
