# Your own text, starting from the model of config/tiny_cpu.py: two minutes for a few hundred KB on 2 cores.
# What loss to expect depends on the text; it has to beat the trigrams that each evaluation prints beside it.
#   python prepare/text.py --input FILE_OR_FOLDER --name mine --tokenizer data/shakespeare_bpe4096/tokenizer.json
#   python train.py config/finetune_own_text.py --device=cpu
# Without init_from (and then better with --tokenizer bpe) it starts from nothing.
dataset = "mine"
arch = "ternary"
init_from = "runs/tiny_cpu"

batch_size = 16
lr = 0.02                           # a quarter of the rates of the first training
rest_lr = 0.0025
warmup_steps = 20
max_steps = 200
eval_every = 50
