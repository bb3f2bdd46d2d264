"""Claims about numbers in answers, each labelled by hand: relaxed accuracy, and what a response ends in."""

import pytest

from ril_jax.evaluation.numbers import final_answer, last_list, last_number, relaxed_correct

RELAXED = [
    # answer, target, right
    ("14", "14", True),
    ("14.0", "14", True),
    ("14.7", "14", True),  # exactly 5 %
    ("14.71", "14", False),
    ("13.3", "14", True),
    ("13.2", "14", False),
    ("-14", "14", False),
    ("-14.2", "-14", True),
    ("0", "0", True),
    ("0.0", "0", True),
    ("0.1", "0", False),
    ("0", "14", False),
    ("1,000", "1000", True),
    ("1000", "1,000", True),
    ("1,00", "100", False),
    ("$1,000.50", "1000.5", True),
    ("1000 dollars", "1000", True),
    ("14 cm", "14", True),
    ("14cm", "14", True),
    ("14.", "14", True),
    ("14 big cars", "14", False),
    ("50%", "50%", True),
    ("51%", "50%", True),
    ("50%", "0.5", True),
    ("0.5", "50%", True),
    ("57%", "57", False),  # a percent sign divides, as in the field's rule
    ("2e3", "2000", True),
    ("Yes", "yes", True),
    ("yes.", "Yes", True),
    ("No", "Yes", False),
    ("United States", "united states", True),
    ("the United States", "United States", False),
    ("", "14", False),
    ("", "Yes", False),
    ("14", "Yes", False),
    ("fourteen", "14", False),
    ("2018", "2009", True),  # within 5 %, which is what the rule says of years
    ("中国", "中国", True),
    ("日本", "中国", False),
    ("14 15", "14", False),
    ("−14", "-14", True),
    (".5", "0.5", True),
]

NUMBERS = [
    ("14", 14),
    ("x = 14", 14),
    ("The number is 14.", 14),
    ("between 3 and 14", 14),
    ("1,234", 1234),
    ("$1.45", 1.45),
    (r"\frac{3}{4}", 0.75),
    (r"$\frac{3}{4}$", 0.75),
    ("3/4", 0.75),
    ("-3", -3),
    ("−3", -3),
    ("2007-2008", 2008),
    ("5%", 5),
    (r"5\%", 5),
    ("1.5e3", 1500),
    (".5", 0.5),
    ("5 cm", 5),
    ("5cm", 5),
    ("fourteen", 14),
    ("two apples", 2),
    (r"14^\circ", 14),
    ("14°", 14),
    ("一共有14个", 14),
    ("3/0", None),
    ("none", None),
    ("", None),
    ("A14", None),
    ("v1.2.3", None),
    ("12,345,678", 12345678),
    ("12,34", 34),
    (r"1{,}234", 1234),
]

FINAL = [
    ("14", "14"),
    ("The answer is 14.", "14"),
    ("The answer is 14. It stands there.", "14"),
    ("The answer is 14.5", "14.5"),
    ("Answer: 1,000", "1,000"),
    ("First 3.\nThen 4.\nSo 7", "7"),
    ("So blue", "blue"),
    ("Two are red, three blue; therefore, blue", "blue"),
    ("因此，红色", "红色"),
    ("So", "So"),
    ("Sofia", "Sofia"),
    (r"Thus \boxed{14}", "14"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    ("<answer>Blue</answer>", "Blue"),
    ("答案是14", "14"),
    ("结果：红色", "红色"),
    ("The answer is 3. No, the answer is 4.", "4"),
    ("**Yes**", "Yes"),
    ("", ""),
    ("\n\n", ""),
    ("The final answer is: $14$", "14"),
    ("The value is 5 cm.", "5 cm"),
]


@pytest.mark.parametrize(("answer", "target", "right"), RELAXED)
def test_relaxed_accuracy(answer, target, right):
    assert relaxed_correct(answer, target) is right


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(("response", "answer"), FINAL)
def test_the_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[2007, 2008]", [2007, 2008]),
        ("between [1, 2] and then [1.5, 2]", [1.5, 2]),
        ("the list is ['a', 'b'].", ["a", "b"]),
        ("[]", None),
        ("[a, b]", None),
        ("2007, 2008", None),
    ],
)
def test_the_last_list(text, values):
    assert last_list(text) == values


def test_every_rule_has_its_thirty_cases():
    assert len(RELAXED) >= 30
    assert len(NUMBERS) >= 30
