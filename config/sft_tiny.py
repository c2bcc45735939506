# Teach the model of config/tiny_cpu.py to answer, with 2,000 records of Alpaca and GSM8K. 3 minutes on 2 cores take the
# loss on held-out answers from 10.9 to 2.13 nats per token (7.48 to 1.46 bits per byte); with --lora_rank=8 to 4.16.
# It learns the form of an answer, not facts: a model of this size has read nothing but Shakespeare.
# Export: as config/tiny_cpu.py.
#   python prepare/sft.py --input=alpaca.json,gsm8k_train.jsonl --tokenizer=runs/tiny_cpu --name=sft_tiny
#   python train.py config/sft_tiny.py --device=cpu
#   python sample.py --checkpoint=runs/sft_tiny --chat
dataset = "sft_tiny"
init_from = "runs/tiny_cpu"

block_size = 512  # the rows of the dataset
batch_size = 8
lr = 0.02  # both rates are a quarter of those of the first training
rest_lr = 0.005
warmup_steps = 20
max_steps = 600
eval_every = 100
