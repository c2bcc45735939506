// How the model in this folder is spoken to, from its tokenizer's files: what thimble/chat.py does, and the same ids.
const MARK = "\ud800";  // half of a surrogate pair, which no text holds: keeps a quoted special token from being one

const escaped = text => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

export class Speaker {
  // vocabulary: tokenizer.json, settings: tokenizer_config.json, ends: the ids that end a text
  constructor(Tokenizer, Template, vocabulary, settings, ends) {
    const special = vocabulary.added_tokens.filter(token => token.special);
    const ordinary = vocabulary.added_tokens.filter(token => !token.special);
    this.plain = new Tokenizer({ ...vocabulary, added_tokens: ordinary }, settings);  // what a user types is text
    this.whole = new Tokenizer(vocabulary, settings);
    this.quoted = new RegExp(special.map(token => escaped(token.content)).join("|"), "g");
    this.bos = settings.add_bos_token ? [special.find(token => token.content === settings.bos_token).id] : [];
    this.ends = ends;
    this.names = Object.fromEntries(["bos", "eos", "pad", "unk"].map(role => [`${role}_token`, settings[`${role}_token`]])
      .filter(([, name]) => name));
    this.template = settings.chat_template && new Template(settings.chat_template);
  }

  ids(text, tokenizer) {
    return text ? tokenizer.encode(text, { add_special_tokens: false }).ids : [];
  }

  decode(ids) {
    return ids.length ? this.whole.decode(ids, { skip_special_tokens: true }) : "";
  }

  prompt(text) {  // ids of a text to continue
    const ids = this.ids(text, this.plain);
    if (this.decode(ids) !== text) throw Error("the prompt contains characters that are not in the vocabulary");
    const all = [...this.bos, ...ids];
    return all.length ? all : this.ends.slice(-1);
  }

  conversation(messages) {  // ids of [{ role, content }], up to where the next answer begins
    const given = messages.map(({ role, content }) =>
      ({ role, content: content.replace(this.quoted, token => token[0] + MARK + token.slice(1)) }));
    const text = this.template.render({ messages: given, add_generation_prompt: true, tools: null, documents: null,
                                        ...this.names });
    return text.split(MARK).flatMap(part => this.ids(part, this.whole));
  }

  fit(messages, n) {  // the same in at most n ids: `messages` loses its oldest exchanges, a long question its beginning
    let ids = this.conversation(messages);
    while (ids.length > n && messages.length > 1) {
      messages.splice(0, 2);
      ids = this.conversation(messages);
    }
    return ids.slice(-n);
  }
}
