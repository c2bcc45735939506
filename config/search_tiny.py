# The best dense model after 60 seconds of training on Shakespeare's plays: 30 trials, half an hour plus evaluations.
# How many steps fit into a minute is measured before each trial, so run nothing else on the machine.
# Export: Llama, with qk_norm Qwen3, with gelu Arcee (not in llama.cpp). With both it is no stock architecture:
# transformers with trust_remote_code, ONNX Runtime and transformers.js.
dataset = "shakespeare_bpe4096"
prepare = "prepare/shakespeare.py --tokenizer=bpe --vocab_size=4096"

space = (
    "n_layer=1..6",
    "n_embd=64..320 step 64",
    "n_head=1|2|4",
    "mlp=swiglu|gelu",
    "qk_norm=true|false",
    "tie_embeddings=true|false",
    "block_size=64|128|256",
    "batch_size=8|16|32",
    "lr=0.005..0.06 log",
    "rest_lr=0.003..0.04 log",
)
n_trials = 30
seconds = 60
n_evals = 4

momentum = 0.9
min_lr = 0.02
dtype = "bfloat16"
