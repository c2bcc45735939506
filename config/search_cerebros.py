# A wiring for the Bible: 30 trials of a minute of training each at most, half an hour on 2 cores. Then phase two:
# python train.py config/cerebros_bible.py --init_from=runs/search_cerebros/best
dataset = "bible_bpe4096"
prepare = "prepare/bible.py"

arch = "cerebros"
space = (
    "wiring_seed=0..9999",
    "n_layer=1..4",
    "max_units=2..5",
    "max_neurons=96..384 step 32",
    "window=8..40 step 4",
    "n_embd=32..128 step 16",
    "n_rank=64|96|128|192",
    "affinity_first=0.3..1.5",
    "affinity=0.1..1.5",
    "affinity_decay=0.3..0.9",
    "p_lateral=0.0..0.8",
    "act=silu|gelu|softplus",
    "lr=0.005..0.06 log",
    "rest_lr=0.003..0.03 log",
    "dropout=0.0..0.2",
)
n_trials = 30
seconds = 60
n_evals = 4

batch_size = 16
momentum = 0.9
min_lr = 0.02
dtype = "bfloat16"
