"""Claims about each benchmark: its prompt word by word, and what its rule makes of responses labelled by hand."""

import pytest
from helpers.benchmark_files import write_all

from ril_jax.errors import InputError
from ril_jax.evaluation.benchmarks import BENCHMARKS, chosen
from ril_jax.evaluation.benchmarks.mmmu import open_correct, parse_choice
from ril_jax.evaluation.rows import Row, RowFile

OPTIONS = "Options:\nA. dog\nB. cat\nC. horse\nD. teddy bear\n"
SELECT = f"{OPTIONS}Please select the correct answer from the options above. \n"
PLAIN = f"Question: Which animal is it?\n{SELECT}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[Row]]:
    folder = write_all(tmp_path_factory.mktemp("benchmarks"))
    return {
        name: [
            row
            for names in benchmark.files
            for row in RowFile.open(next(folder / n for n in names if (folder / n).exists())).rows
            if benchmark.counts(row)
        ]
        for name, benchmark in BENCHMARKS.items()
    }


PROMPTS = {
    ("ai2d", 0): [0, PLAIN],
    ("mmstar", 0): [0, PLAIN],
    ("realworldqa", 0): [0, PLAIN],
    ("seedbench", 0): [0, PLAIN],
    ("seedbench2_plus", 0): [0, PLAIN],
    ("blink", 1): [0, 1, PLAIN],
    ("mmbench", 0): [0, f"Hint: It is small.\n{PLAIN}"],
    ("mmbench_cn", 0): [0, f"Hint: It is small.\n{PLAIN}"],
    ("chartqa", 0): [0, "How high?\nAnswer the question using a single word or phrase."],
    ("mathvista", 0): [0, "Hint: Please answer with an integer.\nQuestion: How many?"],
    ("mmvet", 0): [0, "What is x?"],
    ("mmvet_v2", 0): ["Compare", 0, " with ", 1],
    ("mmmu", 0): [
        "Is ", 1, " or ", 0,
        " larger?\n\n(A) dog\n(B) cat\n(C) horse\n(D) teddy bear\n\n"
        "Answer with the option's letter from the given choices directly.",
    ],
    ("mmmu", 1): [0, " Value?\n\nAnswer the question using a single word or phrase."],
    ("mmmu_pro", 0): [
        "Question: See ", 0,
        f".\n{OPTIONS}E. cow\nF. hen\nAnswer directly with the option letter from the given choices. ",
    ],
    ("mmmu_pro", 1): [
        0,
        "Answer the following multiple-choice question in the image. "
        "Answer directly with the option letter from the given choices. ",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "number"), PROMPTS)
def test_the_prompt(rows, name, number):
    assert BENCHMARKS[name].prompt(rows[name][number]) == PROMPTS[name, number]


def test_every_benchmark_has_its_prompt_told():
    assert {name for name, _ in PROMPTS} == set(BENCHMARKS)
    assert len(BENCHMARKS) == 14


SCORES = [
    # benchmark, row, response, score (None: no answer)
    *((name, 0, "B", 1.0) for name in ("ai2d", "mmstar", "realworldqa", "seedbench", "seedbench2_plus", "blink")),
    ("ai2d", 0, "The answer is cat.", 1.0),
    ("ai2d", 1, "B", 0.0),
    ("ai2d", 0, "A or B", None),
    ("mmbench", 2, "C. cat", 1.0),
    ("chartqa", 0, "14.5", 1.0),
    ("chartqa", 0, "The answer is 14 cm.", 1.0),
    ("chartqa", 0, "15", 0.0),
    ("chartqa", 0, "", None),
    ("chartqa", 1, "Yes it is.", 1.0),
    ("chartqa", 1, "no", 0.0),
    ("mathvista", 0, "There are 14 of them.", 1.0),
    ("mathvista", 0, "14.5", 0.0),
    ("mathvista", 0, "many", None),
    ("mathvista", 1, "The correct answer is (B) 8/11.", 1.0),
    ("mathvista", 1, "8/11", 1.0),
    ("mathvista", 1, "3/11", 0.0),
    ("mmvet", 0, "x is -1 or -5", None),
    ("mmvet_v2", 0, "the left", None),
    ("mmmu", 0, "(B)", 1.0),
    ("mmmu", 0, "hm", None),
    ("mmmu", 1, "So the value is eight.", 1.0),
    ("mmmu", 1, "8.001", 1.0),
    ("mmmu", 1, "9", 0.0),
    ("mmmu_pro", 0, "E. cow", 0.0),
    ("mmmu_pro", 1, "The answer is J.", 1.0),
    ("mmmu_pro", 1, "A", 0.0),
    ("mmmu_pro", 1, "K", None),
]


@pytest.mark.parametrize(("name", "number", "response", "score"), SCORES)
def test_the_score(rows, name, number, response, score):
    benchmark, row = BENCHMARKS[name], rows[name][number]
    parsed = benchmark.parse(row, response)
    assert (None if parsed is None else benchmark.score(row, parsed)) == score


def math(kind: str, answer: str, **fields) -> Row:
    return Row(
        "1", {"question": "?", "question_type": "free_form", "answer_type": kind, "answer": answer} | fields, "X"
    )


MATH = [
    (math("integer", "14"), "14", 1),
    (math("integer", "14"), "14.0", 1),
    (math("integer", "14"), "14.", 1),
    (math("integer", "14"), r"\boxed{14}", 1),
    (math("integer", "14"), "The answer is fourteen", 1),
    (math("integer", "14"), "It is 14 cm long", 1),
    (math("integer", "1400"), "1,400", 1),
    (math("integer", "14"), "-14", 0),
    (math("integer", "14"), "13 + 1", 0),
    (math("integer", "14"), "13 + 1 = 14", 1),
    (math("integer", "14"), "The answer is 13. Or 14?", 0),
    (math("integer", "2008"), "from 2007-2008", 1),
    (math("float", "0.6", precision="1.0"), "0.6", 1),
    (math("float", "0.6", precision="1.0"), "0.61", 1),
    (math("float", "0.6", precision="1.0"), "0.66", 0),
    (math("float", "0.6", precision="1.0"), "3/5", 1),
    (math("float", "0.6", precision="1.0"), r"$\frac{3}{5}$", 1),
    (math("float", "1.45", precision="2.0"), "Luca needs $1.45", 1),
    (math("float", "1.45", precision="2.0"), "1.455", 0),
    (math("float", "1.45", precision="2.0"), "60%", 0),
    (math("list", "[2007, 2008]"), "between [2007, 2008]", 1),
    (math("list", "[2007, 2008]"), "[2008, 2007]", 0),
    (math("list", "[2007, 2008]"), "[2007.0, 2008.0]", 1),
    (math("list", "[2007, 2008]"), "2007 and 2008", None),
    (math("text", "Yes"), "The answer is yes.", 1),
    (math("text", "Yes"), "no", 0),
    (math("text", "红色"), "答案是红色。", 1),
    (math("text", "Yes"), "", None),
    (math("integer", "14"), "一共有14个", 1),
    (math("integer", "14"), "none", None),
    (math("integer", "14"), "", None),
]


@pytest.mark.parametrize(("row", "response", "score"), MATH)
def test_mathvista_extracts_and_compares(row, response, score):
    benchmark = BENCHMARKS["mathvista"]
    parsed = benchmark.parse(row, response)
    assert (None if parsed is None else benchmark.score(row, parsed)) == score


ANIMALS = {"A": "dog", "B": "cat", "C": "horse", "D": "teddy bear"}
MMMU_CHOICES = [
    # MMMU's own parsing, quirks included; but no guess where it guesses
    ("B", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("(B) cat", "B"),
    ("B. cat", "B"),
    ("B: cat", None),
    ("The answer is (B).", "B"),
    ("The answer is B", "B"),
    ("The answer is B.", "B"),
    ("It is B because A is wrong", "A"),  # the last one named
    ("(A) or (B)", "B"),
    ("(A) is right, B is wrong", "A"),  # brackets go first
    ("A, B", "B"),
    ("b", None),
    ("Option b", None),
    ("(b)", None),
    ("cat", None),
    ("a cat", None),
    ("the picture shows clearly that a cat sits", "B"),  # texts only in long responses
    ("the picture shows first a cat and then a dog", "A"),
    ("It must then be a TEDDY BEAR there", "D"),
    ("", None),
    ("...", None),
    ("E", None),
    ("I do not know what that is", None),
    ("'B'", "B"),
    ("B!", "B"),
    ("B;", "B"),
    ("B\n", "B"),
    ("答案是 B", "B"),
    ("答案是B", None),
]


@pytest.mark.parametrize(("response", "letter"), MMMU_CHOICES)
def test_mmmu_parses_a_choice(response, letter):
    assert parse_choice(response, ANIMALS) == letter


MMMU_OPEN = [
    ("8", ["8"], True),
    ("8.0", ["8"], True),
    ("8.004", ["8"], True),
    ("8.01", ["8"], False),
    ("The answer is 8.", ["8"], True),
    ("The answer is 8 cm.", ["8"], True),
    ("x = 8", ["8"], True),
    ("3 + 5 = 8", ["8"], True),
    ("1,000", ["1000"], True),
    ("1000", ["1,000"], True),
    ("1e3", ["1000"], True),
    ("-8", ["8"], False),
    ("8%", ["8"], True),
    ("80", ["8"], False),
    ("the result is eight", ["8", "eight"], True),
    ("So it is a transformer", ["transformer"], True),
    ("Transformer", ["transformer"], True),
    ("transformers", ["transformer"], True),  # held in the text
    ("a resistor", ["transformer"], False),
    ("(x)", ["x"], False),  # a single letter counts beside a space only
    ("the answer is x and more", ["x"], True),
    ("It is 7.\nTherefore 8", ["8"], True),
    ("First 8.\nTherefore 7", ["8"], False),
    ("could be 8", ["8"], True),
    ("thus 24/7", ["24/7"], True),
    ("", ["8"], False),
    ("none", ["8"], False),
    ("$8", ["8"], True),
    ("(8)", ["8"], True),
    ("答案 8", ["8"], True),
    (".5", ["0.5"], False),  # MMMU strips full stops at both ends
]


@pytest.mark.parametrize(("response", "targets", "right"), MMMU_OPEN)
def test_mmmu_grades_open_answers(response, targets, right):
    assert open_correct(response, targets) is right


def test_every_rule_has_its_thirty_cases():
    assert min(map(len, (MATH, MMMU_CHOICES, MMMU_OPEN))) >= 30


def test_rotations_of_a_question_are_one_group(rows):
    groups = [BENCHMARKS["mmbench"].group(row) for row in rows["mmbench"]]
    assert groups == ["MMBench_DEV_EN_V11/7", "MMBench_DEV_EN_V11/8", "MMBench_DEV_EN_V11/7"]


def test_mmmu_counts_validation_alone(rows):
    assert [row.index for row in rows["mmmu"]] == ["2", "3"]


def test_categories(rows):
    assert BENCHMARKS["mmvet"].categories(rows["mmvet"][0]) == ["ocr", "math"]
    assert BENCHMARKS["mathvista"].categories(rows["mathvista"][0]) == ["geometry", "arithmetic", "geometry"]
    assert BENCHMARKS["chartqa"].categories(rows["chartqa"][0]) == ["test_human"]


def test_a_row_without_an_answer_is_told():
    with pytest.raises(InputError, match="X has no `answer`"):
        BENCHMARKS["ai2d"].score(Row("1", {"question": "?", "A": "dog", "B": "cat"}, "X"), "A")


def test_benchmarks_are_chosen_by_name():
    assert [b.name for b in chosen(["mmstar", "ai2d", "mmstar"])] == ["mmstar", "ai2d"]
    assert len(chosen(["all"])) == 14
    with pytest.raises(InputError, match="'mmbanch' is not known; known are all, ai2d"):
        chosen(["mmbanch"])
