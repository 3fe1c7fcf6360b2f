"""Reads yes or no out of an answer, strictly."""

import re

YES, NO, UNKNOWN = "yes", "no", "unknown"

_YES = re.compile(r"(?<![\w-])yes(?![\w-]|'\w)")
# "no" is a verdict where it opens the answer, ends a clause, goes before a conjunction, or follows "answer is". It is
# none in "there is no dog".
_NO = re.compile(
    r"""(?<![\w-])no(?![\w-]|'\w)
        (?: (?<=^no) (?![ ]idea\b)
          | (?<=answer\ is\ no)
          | (?![ \t]+[a-z0-9])
          | (?=[ ](?:and|or|but|because|since|as)\b) )""",
    re.VERBOSE,
)
_OPENING = " \t\r\n\"'`*_([{:.,-<>"


def parse_yes_no(answer: str) -> str:
    """
    Returns `"yes"`, `"no"`, or `"unknown"` where the answer says neither or both.

    Only the words themselves count. "No, it is not", "The answer is: yes" and "Yes it is" are verdicts; "yes or no",
    "This is a cat", "There is no dog" (whose meaning hangs on the question), "nope" and the empty answer are not.
    """
    text = answer.lower().lstrip(_OPENING)
    says_yes, says_no = bool(_YES.search(text)), bool(_NO.search(text))
    if says_yes == says_no:
        return UNKNOWN
    return YES if says_yes else NO
