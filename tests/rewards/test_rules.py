"""Answers by rule: tables of response, solution and whether it is right."""

import random

import pytest

from ril_jax.errors import InputError
from ril_jax.rewards.rules import AnswerRules, extract_answer, is_degenerate, score_answer


def check(response, solution, right, **rules):
    assert score_answer(response, solution, AnswerRules(**rules)) == float(right), (response, solution)


@pytest.mark.parametrize(
    ("response", "solution", "right"),
    [
        ("red", "red", True),
        ("  Red. ", "red", True),
        ("The answer is Red!", "red", True),
        ("answer: the red one", "red", False),
        ("It has two parts.\nred", "red", True),
        ("tally + . + so red", "red", True),
        ("The colour is red.", "red", True),
        ("The colour is red or blue.", "red", False),
        ("The answer is red. It stands left of the blue circle.", "red", True),
        ("<answer>blue</answer> no, <answer>red</answer>", "red", True),
        ("<answer>red</answer> no, <answer>blue</answer>", "red", False),
        (r"Hence \boxed{\text{red}}", "red", True),
        ("the New   York", "new york", True),
        ("York New", "new york", False),
        ("blue", "red", False),
        ("not red", "red", False),
        ("12:30", "12:30", True),
        ("1230", "12:30", False),
        ("3 red circles", "3 red circles", True),
        ("3 blue circles", "3 red circles", False),
        ("2019-05-01", "2019-05-01", True),
        ("（红色）", "红色", True),
        ("(3, 4)", "(3,4)", True),
        ("(34)", "(3,4)", False),
        ("5", "9" * 400, False),
        ("12" * 200, "12" * 200, True),
    ],
)
def test_text_is_compared_without_case_space_and_punctuation(response, solution, right):
    check(response, solution, right)


@pytest.mark.parametrize(
    ("response", "solution", "right"),
    [
        ("5", "5", True),
        ("so 5", "5", True),
        ("so 6", "5", False),
        ("tally + . - + so 15", "5", False),
        ("5.0", "5", True),
        ("There are 3 red and 2 blue ones, 5 in all", "5", True),
        ("I count 3 red and 2 blue ones", "3", False),
        ("The answer is 5 circles.", "5", True),
        ("The answer is 5 or 6.", "5", False),
        ("The answer is 5, 6", "5", False),
        ("The answer is five.", "5", True),
        ("The answer is 2 + 3 = 5", "5", True),
        ("2 + 3 = 5.", "5", True),
        ("1,234", "1234", True),
        ("The answer is 1,234.", "1234", True),
        ("1,2", "12", False),
        ("$3.50", "3.5", True),
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("3-5", "5", False),
        ("3-5", "-5", False),
        ("50%", "50%", True),
        ("50", "50%", True),
        ("0.5", "50%", True),
        ("50 percent", "0.5", True),
        ("50%", "5", False),
        ("1/2", "0.5", True),
        ("0.5", "1/2", True),
        ("1 1/2", "1.5", True),
        (r"The answer is \(\frac{1}{2}\).", "0.5", True),
        (r"\boxed{\dfrac{3}{4}}", "0.75", True),
        (r"So $-\frac12$", "-0.5", True),
        (r"$2\frac{1}{2}$", "2.5", True),
        ("1/0", "1", False),
        (r"\boxed{12{,}000}", "12000", True),
        (r"\boxed{3 \times 10^{4}}", "30000", True),
        ("3e4", "30000", True),
        ("5 cm", "5 cm", True),
        ("5", "5 cm", True),
        ("5 cm", "5", True),
        ("5 centimeters", "5 cm", True),
        ("5 m", "5 cm", False),
        ("5 cm^2", "5 cm²", True),
        ("5 cm", "5 cm^2", False),
        (r"The angle is $30^\circ$.", "30", True),
        ("30 degrees", "30°", True),
        ("It is 2020.", "2019", False),
        ("12345", "12346", False),
        ("no number", "5", False),
        ("v5", "5", False),
        ("**Answer:** 5", "5", True),
        ("Final answer: 5\nThank you!", "5", True),
    ],
)
def test_quantities_are_compared_by_value(response, solution, right):
    check(response, solution, right)


def test_tolerances_are_relative_and_absolute():
    check("104", "100", False)
    check("104", "100", True, relative_tolerance=0.05)
    check("106", "100", False, relative_tolerance=0.05)
    check("0.333", "1/3", False)
    check("0.333", "1/3", True, absolute_tolerance=1e-3)
    check("0.01", "0", False)
    check("0.01", "0", True, absolute_tolerance=0.02)
    check("3", "2", False, relative_tolerance=0.4)
    check("2", "3", True, relative_tolerance=0.4)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("B", True),
        ("b", True),
        ("(B)", True),
        ("(b)", True),
        ("B.", True),
        ("B)", True),
        ("B. Berlin", True),
        ("The answer is B", True),
        ("The answer is (B).", True),
        ("the answer is: B", True),
        ("Answer: **B**", True),
        ("Option b", True),
        ("The correct choice is option B.", True),
        (r"\boxed{B}", True),
        (r"\boxed{\text{B}}", True),
        ("<answer>B</answer>", True),
        ("A is too small and C too large, so B", True),
        ("A chart with C bars.\nAnswer: B", True),
        ("The answer is B because C is empty.", True),
        ("B: a circle", True),
        ("The answer is B, a vitamin.", True),
        ("A", False),
        ("D. B is wrong", False),
        ("A, B", False),
        ("A\nB", False),
        ("A B C D", False),
        ("A and B", False),
        ("(A) (B)", False),
        ("The answer is A or B", False),
        ("The answer is B or C", False),
        ("The answer is (B) or (C)", False),
        ("<answer>A, B, C, D</answer>", False),
        ("The answer is B. The answer is C.", False),
        ("Berlin", False),
        ("I saw a bee", False),
        ("The ball is blue", False),
    ],
)
def test_option_letters(response, right):
    check(response, "B", right)
    check(response, "(B)", right)


@pytest.mark.parametrize(
    ("response", "solution", "right"),
    [
        ("A", "A", True),
        ("The answer is A.", "A", True),
        ("The answer is A", "A", True),
        ("The answer is A because it is red", "A", True),
        ("A red circle stands left", "A", False),
        ("The answer is a red circle", "A", False),
        ("I", "I", True),
        ("The answer is C", "C. a circle", True),
        ("The answer is D", "C. a circle", False),
        ("option c", "option C", True),
        ("The answer is e", "E", True),
        ("K", "K", True),
    ],
)
def test_articles_and_pronouns_are_no_option_letters(response, solution, right):
    check(response, solution, right)


@pytest.mark.parametrize(
    ("response", "solution", "right"),
    [
        ("Yes", "yes", True),
        ("Yes, because the bar is taller.", "yes", True),
        ("No. The bar is shorter.", "Yes", False),
        ("The answer is no.", "no", True),
        ("Yes and no", "yes", False),
        ("It is true", "True", True),
        ("There is nothing", "no", False),
    ],
)
def test_yes_and_no(response, solution, right):
    check(response, solution, right)


@pytest.mark.parametrize(
    "response",
    ["", "   \n", ".", "...!?", "** **", "5 5 5", "so so so so", "5" * 40, "aaaaaaaaaaaaaaaa", "so 5 " + "5 " * 30],
)
def test_empty_and_degenerate_responses_score_zero_whatever_the_solution(response):
    assert is_degenerate(response)
    for solution in ("5", ".", "so", "5" * 40, "a" * 16):
        check(response, solution, False)


@pytest.mark.parametrize("response", ["5", "so 5", "no", "11", "B", "0 0", "红", "1000000", "very very tall"])
def test_short_answers_are_not_degenerate(response):
    assert not is_degenerate(response)


def test_patterns_are_configurable_and_strongest_first():
    rules = {"patterns": (r"verdict=(\w+)", r"guess=(\w+)")}
    check("verdict=5 guess=6", "5", True, **rules)
    check("guess=6", "6", True, **rules)
    check("verdict=5 verdict=7", "7", True, **rules)
    check("The answer is 5\nmaybe 6", "6", True, **rules)
    assert extract_answer("x verdict=5", AnswerRules(**rules)).announced


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"patterns": ("(",)}, "regular expression"),
        ({"patterns": ("answer",)}, "group"),
        ({"relative_tolerance": -1.0}, "relative_tolerance"),
        ({"absolute_tolerance": float("nan")}, "absolute_tolerance"),
        ({"absolute_tolerance": "5%"}, "absolute_tolerance"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(InputError, match=message):
        AnswerRules(**rules)


def test_empty_solution_is_refused():
    with pytest.raises(InputError, match="solution is empty"):
        score_answer("5", " \n")


def test_hostile_text_is_answered_quickly():
    # Patterns with nested repeats could take exponential time on such text.
    for text in (
        "(" * 5000,
        "A " * 5000 + "!",
        "1," * 5000,
        "\\frac{" * 2000,
        "$" * 5001,
        "so " * 3000,
        "A or " * 3000,
    ):
        for solution in ("5", "B", "yes", "red"):
            assert score_answer(text, solution) == 0.0


def test_any_text_gets_a_zero_or_a_one():
    rng = random.Random(0)
    latex = (r"\boxed{", "}", "{", r"\frac{1}{2}", r"\frac12", r"\(", "^{2}", "$", "%", r"\n")
    words = ("answer", "is:", "<answer>", "</answer>", "so", "=", "1/0", "9e999", "1,2", "-5", "(B)", "B.", "or", "²½")
    solutions = ("5", "1/2", "50%", "B", "(c)", "yes", "red", "$", "1e400", "{", "\\boxed{5}", "9" * 400)
    for _ in range(1500):
        text = rng.choice(("", " ")).join(rng.choices([*latex, *words, "\n", "\x00", "red", "5"], k=rng.randint(0, 9)))
        assert score_answer(text, rng.choice(solutions)) in (0.0, 1.0)
