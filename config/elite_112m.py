# x
vocab_size = 49152
n_layer = 12
n_head = 12
n_kv_head = 3
n_embd = 768
n_hidden = 2048
tie_embeddings = True
block_size = 2048
