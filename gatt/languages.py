"""Which language a text is written in, by py3langid: the checker of the language kind.

The package is optional (`pip install '.[languages]'`); its model comes with it, so nothing is downloaded. It chooses
among the languages of `gatt.values.LANGUAGES` and English, so a text in any other language is taken for one of these.
Short texts are hard to tell: below `MIN_CONFIDENCE` no language is named. Measured on the last replies of 1,000
held-out HH-RLHF dialogues, all English: named English are all of more than 5 words, 92 % of those of 3 to 5 words and
half of the shorter ones; none was taken for another language.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

from configs.errors import UserError
from gatt.values import LANGUAGES

MIN_CONFIDENCE = 0.5


def require_identifier() -> None:
    """Raises UserError where the package is not installed."""
    if find_spec("py3langid") is None:
        raise UserError(
            "instruction kind 'language': its checker needs the package py3langid (5 MB, no download at run time): "
            "pip install py3langid, or leave the kind out of kinds"
        )


@cache
def _identifier() -> Any:
    require_identifier()
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_CONFIDENCE)
    identifier.set_languages([*LANGUAGES.values(), "en"])
    return identifier


def language_of(text: str) -> str:
    """ISO 639 code of the language of `text`; "und" where that is not sure."""
    return _identifier().classify(text)[0]
