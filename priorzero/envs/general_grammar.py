"""Command templates for story files whose grammar is not known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Counted over the grammars and walkthroughs of the 56 games other than zork1 that Jericho supports. A template is in
# the table if the grammars of at least 45 games have it, or those of 15 and at least one walkthrough uses it, or those
# of 9 and at least two walkthroughs use it. Directions, "take all" and "drop all" are always in it. Left out are
# commands that only print ("look", "score"), commands to the program ("save"), paraphrases ("put down OBJ" for "drop
# OBJ") and swear words. Within each group, the templates that the walkthroughs use most come first. Words separated by
# "/" are synonyms in most games; the first one that a story's dictionary contains is used.
_NO_OBJECT = """
north; south; west; east; wait/z; down; up; northeast/ne; southwest/sw; southeast/se; northwest/nw; yes/y; out/exit;
in/enter; aft; sleep; no; stand up/stand; get out; listen/hear; jump; port; fore; starboard; smell; swim/dive;
yell/shout; pray; xyzzy
"""
_ONE_OBJECT = """
take/get OBJ; examine OBJ; open OBJ; drop OBJ; read OBJ; push/press OBJ; turn/rotate OBJ; wear OBJ; enter OBJ;
close/shut OBJ; pull OBJ; search OBJ; remove OBJ; turn on OBJ; look in OBJ; drink OBJ; light OBJ; touch/feel OBJ;
blow OBJ; climb OBJ; turn off OBJ; unlock OBJ; move OBJ; eat OBJ; look under OBJ; say OBJ; talk to OBJ; wave OBJ;
follow OBJ; fill OBJ; buy OBJ; sit on OBJ; sit in OBJ; break/smash OBJ; knock on OBJ; play OBJ; get in OBJ;
burn OBJ; rub OBJ; strike OBJ; dig in OBJ; hit OBJ; throw OBJ; stand on OBJ; kill/attack OBJ; untie OBJ; shake OBJ;
lock OBJ; look through OBJ; take off OBJ; go through OBJ; lie on OBJ; cut OBJ; point at OBJ; smell OBJ; listen to OBJ;
lift/raise OBJ; shoot OBJ; lower OBJ; wake OBJ; get off OBJ; squeeze OBJ; lie in OBJ; kick OBJ; climb on OBJ;
climb down OBJ; climb up OBJ; reach in OBJ; wait for OBJ; hold OBJ; kiss OBJ; clean OBJ; empty OBJ; adjust OBJ;
chop OBJ; exit/leave OBJ; look behind OBJ; get on OBJ; tear OBJ; ring OBJ; start OBJ; taste OBJ; set OBJ; swing OBJ;
cross OBJ; jump over OBJ; unwrap OBJ; twist OBJ; unscrew OBJ; cover OBJ; fix OBJ; dig OBJ; answer OBJ; hello OBJ;
bite OBJ; jump off OBJ; free OBJ; wave at OBJ; take/get all; drop all
"""
_TWO_OBJECTS = """
put/insert OBJ in OBJ; ask OBJ about OBJ; give OBJ to OBJ; put OBJ on OBJ; unlock OBJ with OBJ; show OBJ to OBJ;
take/get OBJ from OBJ; throw OBJ at OBJ; look up OBJ in OBJ; set OBJ to OBJ; tie/attach OBJ to OBJ; cut OBJ with OBJ;
point OBJ at OBJ; turn OBJ to OBJ; open OBJ with OBJ; ask OBJ for OBJ; pour OBJ in OBJ; light/burn OBJ with OBJ;
hit OBJ with OBJ; pour OBJ on OBJ; put OBJ under OBJ; kill/attack OBJ with OBJ; dig OBJ with OBJ; fill OBJ with OBJ;
touch OBJ with OBJ; shoot OBJ with OBJ; throw OBJ in OBJ; break/smash OBJ with OBJ; take/get OBJ with OBJ;
clean OBJ with OBJ; lock OBJ with OBJ; rub OBJ with OBJ; pick OBJ with OBJ; tell OBJ about OBJ; feed OBJ to OBJ;
look at OBJ through OBJ; cover OBJ with OBJ; hide OBJ under OBJ; turn OBJ with OBJ; empty OBJ in OBJ; push OBJ to OBJ
"""
OBJECT = "OBJ"
TEMPLATES = [template.strip() for table in (_NO_OBJECT, _ONE_OBJECT, _TWO_OBJECTS) for template in table.split(";")]


def known_templates(dictionary: Iterable[str], *, word_length: int) -> list[str]:
    """The templates whose words a story's dictionary contains, in the order of :data:`TEMPLATES`.

    Args:
        dictionary: words, truncated to ``word_length`` letters.
        word_length: 6 in the versions 1 to 3 of the Z-machine, 9 in later ones.
    """
    words = set(dictionary)
    found = []
    for template in TEMPLATES:
        chosen = [
            next((word for word in part.split("/") if word == OBJECT or word[:word_length] in words), None)
            for part in template.split()
        ]
        if None not in chosen:
            found.append(" ".join(filter(None, chosen)))
    return found


def fill_in(template: str, objects: Sequence[str]) -> list[str]:
    """The commands that a template and the names of objects give. A command with two objects names different ones."""
    first, *rest = template.split(OBJECT)
    if not rest:
        return [template]
    if len(rest) == 1:
        return [first + name + rest[0] for name in objects]
    return [first + one + rest[0] + other + rest[1] for one in objects for other in objects if one != other]
