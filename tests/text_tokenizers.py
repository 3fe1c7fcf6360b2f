"""Small tokenizers of the kinds that language models bring: each joins what a boundary of text may cut."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "a cat and big red dog what is this in the picture it yes no maybe user assistant USER ASSISTANT region".split()
)
SPACE = "▁"


def metaspace_bpe(scheme: str = "first") -> PreTrainedTokenizerFast:
    """
    Makes one like Llama's: SentencePiece's BPE over whole texts, bytes for what it does not know, `<s>` before a text.

    Args:
        scheme (`str`): Where a space is put in front: before a text (`"first"`) or also behind each special token
            (`"always"`).
    """
    merges = [(SPACE, word[0]) for word in WORDS]
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
        merges += [(SPACE + word[:end], word[end]) for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    characters = [SPACE, *sorted(set("".join(WORDS)))]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    pieces += [one + two for one, two in merges]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    return _finished(tokenizer, "<s>", "</s>", unk_token="<unk>")


def byte_bpe(bos: bool = False) -> PreTrainedTokenizerFast:
    """
    Makes one like GPT-2's and Qwen's: BPE over bytes, a word with the space before it. No padding token.

    Args:
        bos (`bool`): Whether it writes `<s>` before a text and trims spaces off its offsets, as Llama 3's.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", word[0]) for word in WORDS]
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
        merges += [("Ġ" + word[:end], word[end]) for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    pieces = ["<s>", "</s>", *alphabet, *(one + two for one, two in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, "<s>" if bos else None, "</s>", trim=bos)


def unigram() -> PreTrainedTokenizerFast:
    """Makes one like T5's: the likeliest pieces of a text whose blanks are one space, `</s>` behind it, no `<s>`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -3.0)]
    pieces += [(character, -6.0) for character in sorted(set("".join(WORDS)) | set(".,:?!<>|_"))]
    pieces += [(word, -5.0) for word in WORDS if len(word) > 1] + [(SPACE + word, -4.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(left=False, right=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


# By name, all kinds; those of Llama and GPT-2 without a padding token and none with a chat template.
TOKENIZERS = {
    "metaspace": metaspace_bpe,
    "metaspace always": lambda: metaspace_bpe("always"),
    "bytes": byte_bpe,
    "bytes trimmed": lambda: byte_bpe(bos=True),
    "unigram": unigram,
}


def _finished(tokenizer, bos, eos, trim=False, **names) -> PreTrainedTokenizerFast:
    specials = [AddedToken(token, normalized=False, special=True) for token in (bos, eos) if token]
    tokenizer.add_special_tokens(specials)
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if bos:
        number = tokenizer.token_to_id(bos)
        steps.append(
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
            )
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, padding_side="right", **names
    )
