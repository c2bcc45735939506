# 112,085,760 parameters, the shape of "Elite-112M": for a GPU. Not trained yet, so its loss and time are unknown.
# Export: Llama in transformers, llama.cpp, ONNX Runtime and transformers.js.
# Needs a text of your own and SmolLM2's tokenizer.json (a vocabulary of 49,152 tokens):
#   python prepare/text.py --input FOLDER --name elite --tokenizer path/to/tokenizer.json
dataset = "elite"

vocab_size = 49152
n_layer = 12
n_head = 12
n_kv_head = 3
n_embd = 768
n_hidden = 2048
tie_embeddings = True
block_size = 2048
dropout = 0.05

batch_size = 128  # x 2,048 = 262,144 tokens per step
micro_batch_size = 8
schedule = "wsd"
decay_frac = 0.4
min_lr = 0.125
warmup_steps = 200
max_steps = 4000
weight_decay = 0.1
eval_every = 250
