"""Claims about reading a choice from a response, each labelled by hand."""

import pytest

from ril_jax.evaluation.options import match_option

ANIMALS = {"A": "dog", "B": "cat", "C": "horse", "D": "teddy bear"}
NUMBERS = {"A": "3", "B": "13", "C": "1,300", "D": "1.3"}
CHINESE = {"A": "猫", "B": "狗", "C": "红色的汽车", "D": "汽车"}
SENTENCES = {"A": "The man is taller", "B": "The woman is taller", "C": "They are equally tall"}
UNITS = {"A": "5 cm", "B": "5 m", "C": "50%", "D": "15 cm"}

CASES = [
    # a letter and nothing else
    ("B", ANIMALS, "B"),
    ("b", ANIMALS, "B"),
    ("B.", ANIMALS, "B"),
    ("(B)", ANIMALS, "B"),
    ("[B]", ANIMALS, "B"),
    (" B\n", ANIMALS, "B"),
    ("**B**", ANIMALS, "B"),
    ("$B$", ANIMALS, "B"),
    ("Option b", ANIMALS, "B"),
    ("option (B).", ANIMALS, "B"),
    ("Ｂ", ANIMALS, "B"),
    ("（Ｂ）", ANIMALS, "B"),
    # a letter and its text
    ("B. cat", ANIMALS, "B"),
    ("B: cat", ANIMALS, "B"),
    ("(B) cat", ANIMALS, "B"),
    ("B) cat", ANIMALS, "B"),
    ("A. dog", ANIMALS, "A"),
    ("B. cat\n\nThe picture shows a cat next to a dog.", ANIMALS, "B"),
    # announced
    ("The answer is (B).", ANIMALS, "B"),
    ("The answer is B", ANIMALS, "B"),
    ("The correct answer is B. cat.", ANIMALS, "B"),
    ("Answer: B", ANIMALS, "B"),
    ("answer: b", ANIMALS, "B"),
    ("The correct option is D because it is soft.", ANIMALS, "D"),
    ("The answer is A because it barks.", ANIMALS, "A"),
    ("The answer is a cat.", ANIMALS, "B"),
    ("The answer is the teddy bear.", ANIMALS, "D"),
    ("First I thought the answer is A. No, the answer is C.", ANIMALS, "C"),
    ("A is a dog and C a horse.\nSo the answer is B.", ANIMALS, "B"),
    (r"Therefore \boxed{B}", ANIMALS, "B"),
    (r"\boxed{\text{C}}", ANIMALS, "C"),
    (r"$\boxed{\text{B. cat}}$", ANIMALS, "B"),
    ("<answer>B</answer>", ANIMALS, "B"),
    ("I see A and C. <answer>D</answer>", ANIMALS, "D"),
    # the text of an option
    ("cat", ANIMALS, "B"),
    ("Cat.", ANIMALS, "B"),
    ("A cat", ANIMALS, "B"),
    ("a cute teddy bear", ANIMALS, "D"),
    ("It is a horse.", ANIMALS, "C"),
    ("The woman is taller", SENTENCES, "B"),
    ("the woman is taller.", SENTENCES, "B"),
    # sentences
    ("I would choose option C.", ANIMALS, "C"),
    ("I think it is B", ANIMALS, "B"),
    ("Looking at the ears and the tail of it,\nthe animal must be a cat.\nB", ANIMALS, "B"),
    # numbers and units
    ("13", NUMBERS, "B"),
    ("1300", NUMBERS, "C"),
    ("1,300", NUMBERS, "C"),
    ("1.3", NUMBERS, "D"),
    ("There are 3 of them.", NUMBERS, "A"),
    ("133", NUMBERS, None),
    ("5 cm", UNITS, "A"),
    ("15 cm", UNITS, "D"),
    ("50%", UNITS, "C"),
    ("5", UNITS, None),
    # Chinese
    ("答案是B", CHINESE, "B"),
    ("答案：B。狗", CHINESE, "B"),
    ("正确答案为（B）", CHINESE, "B"),
    ("故选C", CHINESE, "C"),
    ("我选择D", CHINESE, "D"),
    ("狗", CHINESE, "B"),
    ("图中是一只狗。", CHINESE, "B"),
    ("红色的汽车", CHINESE, "C"),
    ("选项A", CHINESE, "A"),
    ("无法确定", CHINESE, None),
    # several, or none
    ("A or B", ANIMALS, None),
    ("A, B", ANIMALS, None),
    ("A and C", ANIMALS, None),
    ("AB", ANIMALS, None),
    ("A B", ANIMALS, None),
    ("B C D", ANIMALS, None),
    ("B\nB", ANIMALS, "B"),
    ("The answer is A or B.", ANIMALS, None),
    ("(A) or (B)", ANIMALS, None),
    ("Either option A or option B", ANIMALS, None),
    ("a dog and a cat", ANIMALS, None),
    ("A. dog\nB. cat\nC. horse\nD. teddy bear", ANIMALS, None),
    ("", ANIMALS, None),
    ("   ", ANIMALS, None),
    ("I don't know.", ANIMALS, None),
    ("Spider", ANIMALS, None),
    ("E", ANIMALS, None),
    ("It is not a cat.", ANIMALS, None),
    ("A spider sits there.", ANIMALS, None),
    ("I cannot determine whether it is a cat.", ANIMALS, None),
    ("...", ANIMALS, None),
    ("category", ANIMALS, None),
    ("B", {}, None),
]


@pytest.mark.parametrize(("response", "options", "letter"), CASES, ids=[repr(case[0])[:40] for case in CASES])
def test_the_option_of_a_response(response, options, letter):
    assert match_option(response, options) == letter


def test_every_rule_has_its_thirty_cases():
    assert len(CASES) >= 30
