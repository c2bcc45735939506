# A wiring for the Bible: 30 trials of 120 steps, 14 of them stopped after 40. In 14 minutes on half of one core from
# 1.706 to 1.670 bits per byte. Then train the winner:
# python train.py config/cerebros_bible.py --init_from=runs/search_cerebros/best
# The budget is in steps, not seconds, so that a busy machine finds the same. The window stays 40 tokens, as in the ONNX
# export; which of its places a wiring reads is searched.
# Export: as config/cerebros_bible.py.
dataset = "bible_bpe4096"
prepare = "prepare/bible.py"

arch = "cerebros"
space = (
    "wiring_seed=0..9999",
    "n_layer=1..3",
    "max_units=2..4",
    "max_neurons=128..384 step 64",
    "n_embd=64..128 step 32",
    "n_rank=64..192 step 64",
    "affinity_first=0.05..0.5",
    "recency=0.5..3.0",
    "affinity=0.1..1.0",
    "p_lateral=0.0..0.8",
    "lr=0.01..0.08 log",
    "rest_lr=0.005..0.04 log",
)
n_trials = 30

batch_size = 8
momentum = 0.9
warmup_steps = 10
min_lr = 0.02
max_steps = 120
eval_every = 40
keep_last = 1
dtype = "bfloat16"
