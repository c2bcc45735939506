# nexus_bytes.py with a vocabulary of 1,000 tokens instead of single bytes: compare their bits per byte.
# 2 cores, tinyshakespeare: 2.08 bits per byte in 4 minutes; nexus_bytes.py reaches 2.17.
# Export: GraniteMoeHybrid in transformers, llama.cpp, ONNX Runtime and transformers.js.
dataset = "shakespeare_bpe1000"
prepare = "prepare/shakespeare.py --tokenizer=bpe --vocab_size=1000"

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
