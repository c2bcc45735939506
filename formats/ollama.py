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


def modelfile(file, tokenizer, stop_ids, block_size, template):
    """The text of the Modelfile. template: of thimble.chat; "" if the model was not taught to answer."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {block_size}"]
    lines += [f'PARAMETER stop "{tokenizer.token(i)}"' for i in stop_ids]
    go = go_template(tokenizer, template) if template else "{{ .Prompt }}"
    lines.append(f'TEMPLATE """{go}"""')
    return "\n".join(lines) + "\n"


def go_template(tokenizer, template):
    """One exchange as Ollama writes it again and again, the system message first."""
    asked = written(tokenizer, [USER], template, reply=True)
    with_system = written(tokenizer, [SYSTEM, USER], template, reply=True)
    answered = written(tokenizer, [USER, ASSISTANT], template)
    system = with_system.removesuffix(asked)
    answer = answered.removeprefix(asked)
    # Ollama cuts the last exchange behind .Response, so what stands before an answer must not be there without one
    return f"{{{{ if .System }}}}{system}{{{{ end }}}}{asked}{{{{ if .Response }}}}{answer}{{{{ end }}}}"


def written(tokenizer, messages, template, reply=False):
    """The text of a conversation, with the names of special tokens."""
    special = {chat.START: chat.START[0], chat.END: tokenizer.token(chat.end_id(tokenizer, template))}
    text = ""
    for part, _ in chat.parts(messages, template, reply):
        text += special.get(part, part)
    return text
