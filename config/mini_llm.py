# A 27 M GELU model, the shape of "Mini LLM" (27,073,024 parameters), on Shakespeare, with a vocabulary of 8,000 tokens.
# 2 cores: 6 minutes, validation loss 4.65 nats per token, 2.09 bits per byte (trigrams of bytes: 2.90).
# Export: Arcee in transformers; ONNX Runtime and transformers.js. Not llama.cpp: without a gate it knows ReLU^2 only.
dataset = "shakespeare_bpe8000"
prepare = "prepare/shakespeare.py --tokenizer=bpe --vocab_size=8000"

vocab_size = 8000
n_layer = 6
n_head = 8
n_embd = 512
n_hidden = 2048
mlp = "gelu"
block_size = 128
dropout = 0.1

batch_size = 16
lr = 0.02
rest_lr = 0.01
max_steps = 400
eval_every = 100
prompts = ("To be", "The king")
