# x
dataset = "shakespeare_bpe4096"
prepare = "prepare/shakespeare.py --tokenizer=bpe --vocab_size=4096"
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 8
