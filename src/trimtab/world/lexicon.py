"""Word lists of the small world. Every word is one token (with its leading space) of the shipped
tokenizer, which keeps prompts short and answers comparable; a test holds the lists to that."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text, as they stand."""
    return tuple(text.split())


KEYS = words(
    """
    house room door window garden table chair bed floor wall hall kitchen castle church school
    village town country river sea island shore forest tree wood field road path hill stone rock
    gate yard street corner court inn prison camp fort port boat ship sail train carriage coach
    cart horse dog cat bird fish bear whale animal beast hat coat dress pocket handkerchief ring
    iron box chest book letter paper pen note watch bell gun stick fire light smoke bread wine
    tea water dinner breakfast supper glass hand head face heart nose neck arm foot shoulder hair
    moon sun sky cloud snow wind earth air grass rose bank mill board band station key grave
    spring ball song story law account
    """
)
"""Things that a record is about."""

VALUES = words(
    """
    time day night morning evening week month year hour minute moment mother father sister brother
    uncle aunt husband wife daughter son lady gentleman woman king prince princess captain doctor
    master servant soldier officer prisoner peasant stranger judge general guard maid cook baby
    child boy friend enemy joy love hope fear pride pity sorrow pain pleasure delight honor truth
    faith luck chance fortune power force strength beauty youth age health death life peace war
    battle fight danger trouble duty work business money cost promise secret answer question
    reason idea thought dream sleep rest silence noise sound voice music hunt journey visit
    meeting party marriage history art nature spirit soul mind body blood eye cold warm hot dark
    bright deep high low long short wide small big fine old young new good bad rich poor happy sad
    proud quiet loud sweet bitter sharp soft hard strong weak quick slow
    """
)
"""What a record says about its key. No word is both a key and a value."""
