"""The Modelfile beside a GGUF file, from which Ollama makes a model: `ollama create NAME -f Modelfile`.

    FROM ./tiny.gguf
    PARAMETER num_ctx 256
    PARAMETER stop "<|endoftext|>"
    TEMPLATE \"\"\"{{ .Prompt }}\"\"\"
"""
from thimble import chat
from thimble.files import UserError, warn

SYSTEM = {"role": "system", "content": "{{ .System }}"}  # Ollama fills these in, by the rules of Go's templates
USER = {"role": "user", "content": "{{ .Prompt }}"}
ASSISTANT = {"role": "assistant", "content": "{{ .Response }}"}


def modelfile(file, tokenizer, block_size):
    """The text of the Modelfile of a GGUF file."""
    record = tokenizer.record
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {block_size}"]
    for i in record.ends:
        token = tokenizer.token(i)
        quote = '"""' if '"' in token else '"'  # three of them may have others in between
        lines.append(f"PARAMETER stop {quote}{token}{quote}")
    asks = ['TEMPLATE """{{ .Prompt }}"""']  # where it was not taught to answer
    if record.template:
        try:
            asks = go_template(tokenizer)
        except UserError as error:
            warn(f"{str(error).rpartition(':')[0]}: the Modelfile has a plain prompt in its place")
    return "\n".join([*lines, *asks]) + "\n"


def go_template(tokenizer):
    """The lines with the default system text, and with the template of an exchange, which Ollama repeats for each."""
    asked = written(tokenizer, [USER], reply=True)
    answered = written(tokenizer, [USER, ASSISTANT])
    talk = written(tokenizer, [USER, ASSISTANT, USER], reply=True)
    # an earlier answer, which Qwen3 writes without the thoughts that it puts before the last one
    before, _, behind = talk.partition(ASSISTANT["content"])
    end = answered.partition(ASSISTANT["content"])[2]
    answer = before.removeprefix(asked) + ASSISTANT["content"] + end
    later = behind.removeprefix(end)  # a question with nothing before it
    lines = []
    system = system_part(tokenizer, later)
    if system and asked != later:  # the template has a system text of its own, for who writes none
        start, _, rest = system.partition(SYSTEM["content"])
        default = asked.removesuffix(later).removeprefix(start).removesuffix(rest)
        lines.append(f'SYSTEM """{default}"""')
    if system:
        system = f"{{{{ if .System }}}}{system}{{{{ end }}}}"
    # Ollama cuts the last exchange behind .Response, so what stands before an answer must not be there without one
    return [*lines, f'TEMPLATE """{system}{later}{{{{ if .Response }}}}{answer}{{{{ end }}}}"""']


def system_part(tokenizer, later):
    """What a system text puts before the question `later`; "" where the template knows none, or has it elsewhere."""
    try:
        text = written(tokenizer, [SYSTEM, USER], reply=True)
    except UserError:  # Mistral's first template refuses it
        return ""
    return text.removesuffix(later) if text.endswith(later) else ""


def written(tokenizer, messages, reply=False):
    """The text of a conversation, with the names of special tokens, and without the bos that Ollama puts in front."""
    record = tokenizer.record
    text = chat.render(tokenizer, messages, chat.OWN, reply)
    return text.removeprefix(tokenizer.token(record.bos)) if record.adds_bos else text
