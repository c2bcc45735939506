# The Bible, by a random wiring (cerebros.py). With --init_from=runs/search_cerebros/best it is phase two of a search:
# the wiring that was found, trained for longer. Two epochs in 4 minutes on one core: 1.451 bits per byte, perplexity
# 46.5 (from random weights, with the wiring of seed 0: 1.453; trigrams of tokens: 1.546). No key here sets a shape, so
# that the wiring that was found keeps its own.
# Export: no stock architecture is wired like this: transformers with trust_remote_code, ONNX Runtime with
# --window=true; not llama.cpp, nor transformers.js, whose models have a cache.
dataset = "bible_bpe4096"
prepare = "prepare/bible.py"

arch = "cerebros"

batch_size = 8
lr = 0.03
momentum = 0.9
rest_lr = 0.015
schedule = "restarts"
warmup_steps = 50
restart_steps = 300
restart_mul = 2.0
restart_decay = 0.5
min_lr = 0.02
max_steps = 950
eval_every = 190
dtype = "bfloat16"
prompts = ("In the beginning", "Jesus said")
