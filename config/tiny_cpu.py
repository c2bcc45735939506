# The first run: ternary weights (BitNet b1.58), 3.7 M parameters, Shakespeare with a vocabulary of 4,096 tokens.
# 2 cores: 3 minutes of training, validation loss 4.14 nats per token, 2.0 bits per byte (counting trigrams of bytes:
# 2.9), 2.65 MiB packed.
# Export: BitNet in transformers and llama.cpp; ONNX Runtime and transformers.js.
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
rest_lr = 0.02
schedule = "wsd"
decay_frac = 0.4
max_steps = 500
eval_every = 100
prompts = ("To be", "The king")
