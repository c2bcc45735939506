# Fine-tune the model of config/tiny_cpu.py on a text of your own: two minutes for a few hundred KB on 2 cores. The loss
# to expect depends on the text; it should beat the trigrams that each evaluation prints beside it.
#   python prepare/text.py --input FILE_OR_FOLDER --name mine --tokenizer data/shakespeare_bpe4096/tokenizer.json
#   python train.py config/finetune_own_text.py --device=cpu
# With --init_from= (empty) it starts from random weights; a tokenizer of its own (--tokenizer bpe) is then better.
# Another run, a Hugging Face folder or a GGUF file may stand there, too; the text needs the tokenizer of that.
# Export: as config/tiny_cpu.py.
dataset = "mine"
init_from = "runs/tiny_cpu"

batch_size = 16
lr = 0.02  # a quarter of the rate of the first training
rest_lr = 0.0025  # an eighth
warmup_steps = 20
max_steps = 200
eval_every = 50
