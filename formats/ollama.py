"""The Modelfile beside a GGUF file, from which Ollama makes a model: `ollama create NAME -f Modelfile`.

    FROM ./tiny.gguf
    PARAMETER num_ctx 256
    PARAMETER stop "<|endoftext|>"
    TEMPLATE \"\"\"{{ .Prompt }}\"\"\"
"""
from thimble import chat

SYSTEM = {"role": "system", "content": "{{ .System }}"}  # Ollama fills these in, by the rules of Go's templates
USER = {"role": "user", "content": "{{ .Prompt }}"}
ASSISTANT = {"role": "assistant", "content": "{{ .Response }}"}


def modelfile(file, tokenizer, block_size):
    """The text of the Modelfile of a GGUF file."""
    record = tokenizer.record
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {block_size}"]
    lines += [f'PARAMETER stop "{tokenizer.token(i)}"' for i in record.ends]
    if not record.template:  # it was not taught to answer
        lines.append('TEMPLATE """{{ .Prompt }}"""')
        return "\n".join(lines) + "\n"
    lines += go_template(tokenizer)
    return "\n".join(lines) + "\n"


def go_template(tokenizer):
    """The lines with the default system text, and with the template of an exchange, which Ollama repeats for each."""
    asked = written(tokenizer, [USER], reply=True)
    with_system = written(tokenizer, [SYSTEM, USER], reply=True)
    answered = written(tokenizer, [USER, ASSISTANT])
    later = written(tokenizer, [USER, ASSISTANT, USER], reply=True).removeprefix(answered)  # nothing before it
    answer = answered.removeprefix(asked)
    system = with_system.removesuffix(later)
    lines = []
    if asked != later:  # the template has a system text of its own, for who writes none
        before, _, after = system.partition(SYSTEM["content"])
        default = asked.removesuffix(later).removeprefix(before).removesuffix(after)
        lines.append(f'SYSTEM """{default}"""')
    # Ollama cuts the last exchange behind .Response, so what stands before an answer must not be there without one
    go = f"{{{{ if .System }}}}{system}{{{{ end }}}}{later}{{{{ if .Response }}}}{answer}{{{{ end }}}}"
    return [*lines, f'TEMPLATE """{go}"""']


def written(tokenizer, messages, reply=False):
    """The text of a conversation, with the names of special tokens, and without the bos that Ollama puts in front."""
    record = tokenizer.record
    text = chat.render(tokenizer, messages, chat.OWN, reply)
    return text.removeprefix(tokenizer.token(record.bos)) if record.adds_bos else text
