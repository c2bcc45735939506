# Character-level tinyshakespeare in seconds. 2 cores: 4 s of training, 7.9 s in all, a tenth of what nanoGPT takes.
# Validation loss 1.86 nats per character (2.68 bits per byte); counting trigrams gives 2.05.
# Small, with QK-norm and high rates: made to learn fast rather than to go far.
# Export: Qwen3, which is what QK-norm makes of it, in transformers, llama.cpp, ONNX Runtime and transformers.js.
dataset = "shakespeare_char"
prepare = "prepare/shakespeare.py --tokenizer=char"

n_layer = 3
n_head = 4
n_embd = 128
block_size = 64
qk_norm = True

batch_size = 24
lr = 0.03
rest_lr = 0.03
momentum = 0.9
max_steps = 120
eval_every = max_steps
