"""What of a completion is graded: after reasoning and special tokens; which program; which answer; what it is equal to."""

from __future__ import annotations

import pytest
from carerl_kernels.grpo import Example
from carerl_kernels.rewards.reasoning import graded_text, strip_reasoning
from carerl_kernels.rewards.verifiers import MathMatch, exact_match, extract_code, instructions_followed
from carerl_kernels.rewards.verifiers.answers import committed_answer, is_words
from carerl_kernels.rewards.verifiers.fences import fenced_blocks
from carerl_kernels.rewards.verifiers.numbers import number, same_number
from hypothesis import given
from hypothesis import strategies as st

# ------------------------------------------------------------------------------------------------- reasoning and tokens

TRACES = {
    "<think>{}</think>": "<think>", "<thinking>\n{}\n</thinking>\n": "<thinking>", "<reasoning>{}</reasoning>": "<reasoning>",
    "<Think>{}</think>": "<Think>", "<thought>{}</thought>\n": "<thought>", "<seed:think>{}</seed:think>": "<seed:think>",
    "[THINK]{}[/THINK]": "[THINK]", "◁think▷{}◁/think▷": "◁think▷", "<|START_THINKING|>{}<|END_THINKING|>": "<|START_THINKING|>",
    "<|begin_of_thought|>{}<|end_of_thought|>": "<|begin_of_thought|>", "<unused94>{}<unused95>": "<unused94>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>": "<|channel|>analysis<|message|>",
}  # fmt: skip


@pytest.mark.parametrize("trace", TRACES)
def test_reasoning_is_left_out_and_an_unfinished_trace_is_not_graded(trace):
    assert graded_text(trace.format("maybe 3") + "4").strip() == "4"
    assert graded_text(trace.format("") + "4").strip() == "4"
    assert graded_text(trace.format("maybe 3") + "4<|im_end|>").strip() == "4"
    assert graded_text(TRACES[trace] + "maybe \\boxed{3}") is None
    assert strip_reasoning(trace.format("maybe 3") + "4", False) == trace.format("maybe 3") + "4"


@pytest.mark.parametrize(
    ("text", "mode", "graded"),
    [
        ("4", True, "4"),
        ("", True, ""),
        ("hm, 3?\n</think>\n\n4", True, "\n\n4"),  # opened by the prompt
        ("hm, 3?</think>4", True, "4"),
        ("hm, 3?</think>4", "opened", "4"),
        ("hm, 3", "opened", None),
        ("hm, 3", True, "hm, 3"),
        ("<think>a <think>b</think> c</think>4", True, "4"),
        ("<think>a</think>4\n<think>b</think>5", True, "4\n5"),
        ("4\n<think>no, 5", True, None),
        ("re.sub('<think>.*</think>', '', text)", True, "re.sub('<think>.*</think>', '', text)"),
        ("text.split('</think>')[1]", True, "text.split('</think>')[1]"),
        ("The tag `<think>` opens it.", True, "The tag `<think>` opens it."),
        ("<|channel|>commentary<|message|>x<|end|><|channel|>final<|message|>4<|return|>", True, "4"),
    ],
)
def test_what_is_reasoning_and_what_is_text(text, mode, graded):
    assert graded_text(text, mode) == graded


TOKENS = [
    "<|im_end|>",
    "<|endoftext|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<pad>",
    "[PAD]",
]


@pytest.mark.parametrize("token", TOKENS)
def test_special_tokens_at_the_ends_do_not_count(token):
    assert exact_match(Example("?", "4"), f"4{token}") == 1
    assert exact_match(Example("?", "4"), f"4{token}\n{token}{token}") == 1
    assert exact_match(Example("?", "4"), f"5{token}") == 0
    assert exact_match(Example("?", token), token) == 1  # where it is the answer
    assert graded_text(f"a {token} b") == f"a {token} b"


def test_every_verifier_leaves_reasoning_out(math_match):
    trace, unfinished = "<think>maybe Yes 5</think>", "<think>4 Yes"
    assert exact_match(Example("?", "4"), trace + "4") == 1 and exact_match(Example("?", "<think>4"), "<think>5") == 0
    assert exact_match(Example("?", "4"), trace + "4", strip_reasoning=False) == 0
    starts = Example("?", info={"instructions": [{"check": "starts_with", "phrase": "Yes"}]})
    assert instructions_followed(starts, trace + "Yes") == 1 and instructions_followed(starts, "Yes" + unfinished) == 1
    assert (
        instructions_followed(Example("?", info={"instructions": [{"check": "words", "at_most": 9}]}), unfinished) == 0
    )
    assert math_match(Example("?", "4"), trace + "\\boxed{4}") == 1
    assert math_match(Example("?", "4"), "<think>\\boxed{4}") == 0


@given(st.text(alphabet="<>/think|[]THINK\n a`"))
def test_any_text_can_be_read(text):
    graded = graded_text(text)
    assert graded is None or isinstance(graded, str)
    assert strip_reasoning(text, False) == text


# ------------------------------------------------------------------------------------------------------------- programs

RIGHT = "print(1)\n"
DOCSTRING = 'def f():\n    """Adds.\n\n    ```python\n    f()\n    ```\n    """\n    return 1\n'
PROGRAMS = {
    "a closing fence is no opening one": "```bash\npython a.py\n```\nThe program:\n```python\nprint(1)\n```\n",
    "output behind": "```python\nprint(1)\n```\nIt prints\n```\n1\n```\n",
    "output behind, nothing marked": "```\nprint(1)\n```\nOutput:\n```\n1\n```\n",
    "marked output": "```python\nprint(1)\n```\n```text\n1\n```\n```output\n1\n```",
    "commands behind": "```python\nprint(1)\n```\nRun it:\n```sh\npython x.py\n```",
    "commands behind, nothing marked": "```\nprint(1)\n```\nThen\n```\n$ python x.py\n```",
    "usage behind": "```python\nprint(1)\n```\n**Example usage:**\n```python\nfoo()\n```",
    "CRLF": "```python\r\nprint(1)\r\n```\r\n",
    "tildes": "~~~python\nprint(1)\n~~~",
    "four": "````python\nprint(1)\n````",
    "attributes": "```{.python .numberLines startFrom=1}\nprint(1)\n```",
    "a title": '```python title="a.py"\nprint(1)\n```',
    "a file name": "```python:main.py\nprint(1)\n```",
    "braces": "```{python}\nprint(1)\n```",
    "a blank": "``` python\nprint(1)\n```",
    "capitals": "```Python3\nprint(1)\n```",
    "indented in a list": "1. Do:\n\n   ```python\n   print(1)\n   ```\n",
    "indented by tabs": "\t```py\n\tprint(1)\n\t```\n",
    "quoted": "> ```python\n> print(1)\n> ```",
    "never closed": "Here:\n```python\nprint(1)",
    "cut off in the closing fence's line": "```python\nprint(1)\n```<|im_end|>",
    "never closed before another": "```bash\nls\n\n```python\nprint(1)\n```",
    "text behind the closing fence": "```python\nprint(1)\n``` Done.",
    "opened behind text": "Here it is: ```python\nprint(1)\n```",
    "on one line": "```python print(1)```",
    "the last one": "```python\nprint(2)\n```\nNo:\n```python\nprint(1)\n```",
    "a broken string before": '```python\ns = """abc\n```\nFixed:\n```python\nprint(1)\n```',
    "inline code around": "Use `print` or ```print(2)``` so:\n```py\nprint(1)\n```",
    "no fence": "print(1)\n",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_is_found(name):
    assert extract_code(graded_text(PROGRAMS[name])).strip() == RIGHT.strip()


@pytest.mark.parametrize(
    "fence", ["```python\n{}```", "~~~py\n{}~~~", "````\n{}````", "{}", "Text.\n\n```python\n{}```\nText."]
)
@pytest.mark.parametrize("program", [DOCSTRING, DOCSTRING.replace("python", ""), DOCSTRING.replace('"""', "'''")])
def test_a_fence_in_a_docstring_is_part_of_the_program(fence, program):
    assert extract_code(fence.format(program)) == program


def test_the_block_that_defines_the_function_is_the_program():
    text = "```python\ndef f():\n    return 1\n```\nA check:\n```python\nassert f() == 1\n```"
    assert extract_code(text, ["f"]) == "def f():\n    return 1\n" and extract_code(text) == "assert f() == 1\n"
    assert extract_code(text, ["g"]) == "assert f() == 1\n"
    assert "class Solution" in extract_code("```\nclass Solution:\n    def f(self): pass\n```\n```\nx\n```", ["f"])


def test_blocks_in_order():
    blocks = fenced_blocks("a\n```json\n{}\n```\nb\n~~~\n```\n~~~\n```py\nx")
    assert [(b.language, b.text, b.before) for b in blocks] == [
        ("json", "{}\n", "a"),
        ("", "```\n", "b"),
        ("py", "x\n", "b"),
    ]


# --------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "forms",
    [
        ["-3", "−3", "- 3", "–3", "$-3$", "-3.0", "\\(-3\\)", "x = -3", "**-3**", "-6/2", "－３"],
        [
            "1234567",
            "1,234,567",
            "1{,}234{,}567",
            "1 234 567",
            "1\\,234\\,567",
            "1.234567e6",
            "1,234,567.",
            "1\u202f234\u202f567",
        ],
        [
            "3/2",
            "1.5",
            "1 1/2",
            "1\\frac{1}{2}",
            "1\\frac12",
            "\\dfrac{3}{2}",
            "\\tfrac32",
            "1½",
            "150%",
            "1.50",
            "3⁄2",
        ],
        ["6.02e23", "6.02E+23", "6.02 \\times 10^{23}", "6.02×10^23", "6.02 * 10^23", "6.02·10²³"],
        ["4", "4.", "4.0", "4 ", "+4", "４"],
        ["18.90", "$18.90", "\\$18.90", "$\\$18.90$", "18.9 dollars", "18.9"],
        ["5 cm", "5cm", "5\\text{ cm}", "0.05 m", "50 mm", "5 centimeters", "5"],
        ["36 km/h", "10 m/s", "10 meters per second", "36\\text{ km/h}"],
        ["90°", "90 degrees", "90^\\circ", "90^{\\circ}", "90"],
        ["3 m^2", "3 m²", "3 square meters", "30000 cm^2"],
        ["2 hours", "120 minutes", "7200 s"],
        ["2 million", "2000000", "2e6"],
    ],
    ids=lambda forms: forms[0],
)
def test_forms_of_one_number(forms):
    gold = number(forms[0])
    for form in forms:
        found = number(form, attached=bool(gold.unit))
        assert found is not None and same_number(gold, found) and same_number(found, gold), form


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        ("3", "-3"), ("5 cm", "5 m"), ("5 kg", "5 g"), ("5 m", "5 s"), ("3 m^2", "3 m"), ("5 apples", "5 oranges"), ("50%", "5"),
        ("$5", "€5"), ("1 1/2", "11/2"), ("6.02e23", "6.02"), ("6.6e-34", "3e-34"), ("1/3", "0.3333"), ("1000000", "1000000.4"),
        ("2 million", "2"), ("1,234", "1.234"), ("0.1234567", "0.1234"),
    ],
)  # fmt: skip
def test_numbers_that_differ(gold, found):
    assert not same_number(number(gold), number(found))


@pytest.mark.parametrize(
    "text", ["2x", "2pi", "5 or 7", "1.5.2", "3!", "2^{10}", "1,23", "1/0", "", "x", "5m", "9" * 500, "1e99999"]
)
def test_what_is_no_number(text):
    assert number(text) is None


def test_a_rounded_decimal_is_the_number():
    assert same_number(number("1/3"), number("0.333333")) and same_number(number("2/3"), number("0.6666667"))
    assert same_number(number("0.1234567"), number("0.123457")) and not same_number(
        number("0.1234567"), number("0.123458")
    )


# ----------------------------------------------------------------------------------------------------- the last word


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First I get \\boxed{2}.\nThat misses a factor, so it is wrong.\nTherefore \\boxed{3}.", "3"),
        ("\\boxed{2} and \\boxed{3}", "2, 3"),
        ("$x = \\boxed{2}$ or $x = \\boxed{3}$", "2, 3"),
        ("\\boxed{2}\n\n\\boxed{3}", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox{5}", "5"),
        ("\\boxed 5", "5"),
        ("\\boxed{3} and then \\boxed{4", "3"),
        ("\\boxed{2} <answer>3</answer>", "3"),
        ("<answer>2</answer> or rather <answer>3</answer>", "3"),
        ("<answer>3</answer> \\boxed{2}", "2"),
        ("<answer>\\boxed{3}</answer>", "3"),
        ("so <answer>3", "3"),  # generation stopped at the closing tag
        ("5\n#### 3", "3"),
        ("The answer is 2. Actually no, the answer is 3.", "3"),
        ("\\boxed{2}. So the final answer is 3.", "3"),
        ("\\boxed{3}. The answer is correct.", "3"),
        ("\\boxed{2}. Wait, that is wrong. Therefore x = 3.", "x = 3"),
        ("\\boxed{3}. Therefore we are done.", "3"),
        ("**Final answer:** 3", "3"),
        ("The answer is:\n\n3", "3"),
    ],
)
def test_the_last_committed_answer_decides(text, answer):
    assert committed_answer(text).text == answer


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ("east", True),
        ("no", True),
        ("Paris", True),
        ("no solution", True),
        ("(B)", True),
        ("C", True),
        ("\\text{Yes}", True),
        ("Москва", True),
        ("北京", True),
        ("ab", False),
        ("xyz", False),
        ("x + y", False),
        ("\\pi", False),
        ("2pi", False),
        ("sin x", False),
        ("x=5", False),
        ("\\frac{1}{2}", False),
        ("May 5, 2024", True),
    ],
)
def test_which_right_answers_are_words(gold, words):
    assert is_words(gold) is words


# ------------------------------------------------------------------------------------------------------------ the grade


@pytest.fixture(scope="module")
def math_match():
    pytest.importorskip("math_verify")
    verifier = MathMatch(timeout=20)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("gold", "completion", "reward"),
    [
        ("\\$18.90", "\\boxed{18.90}", 1),
        ("18.90", "It costs $18.90.", 1),
        ("\\$18.90", "It costs 19.80 dollars.", 0),
        ("east", "seat", 0),
        ("east", "\\boxed{\\text{East}}", 1),
        ("east", "It blows to the east.", 0),
        ("no", "on", 0),
        ("no", "No.", 1),
        ("no", "**No**, it is not.", 1),
        ("yes", "No.", 0),
        ("Paris", "The capital of France is Paris.", 1),
        ("Paris", "It is not Paris.", 0),
        ("Paris", "The answer is Paris, because it is.", 1),
        ("the Nile", "\\boxed{Nile}", 1),
        ("no solution", "\\boxed{\\text{No solution}}", 1),
        ("(B)", "\\boxed{B}", 1),
        ("B", "The answer is (B) Paris.", 1),
        ("B", "The answer is (A).", 0),
        ("True", "\\boxed{true}", 1),
        ("6.02e23", "\\boxed{6.02 \\times 10^{23}}", 1),
        ("6.02e23", "6.02", 0),
        ("1 1/2", "\\boxed{\\frac32}", 1),
        ("1 1/2", "\\boxed{1}", 0),
        ("2pi", "\\boxed{2\\pi}", 1),
        ("2pi", "\\boxed{2π}", 1),
        ("2pi", "2", 0),
        ("2\\pi", "The answer is $2\\pi$.", 1),
        ("4.", "\\boxed{4}", 1),
        ("-3", "The answer is −3.", 1),
        ("-3", "\\boxed{3}", 0),
        ("5 cm", "\\boxed{5 m}", 0),
        ("5 cm", "The answer is 5 m, as computed.", 0),
        ("5 cm", "So the length is 5 m.", 0),
        ("5 m", "The length is 500 cm.", 1),
        ("5 cm", "\\boxed{5cm}", 1),
        ("5", "\\boxed{5 \\text{ cm}}", 1),
        ("2, 3", "x = \\boxed{2} or x = \\boxed{3}", 1),
        ("\\{2, 3\\}", "\\boxed{2}. Wrong. Therefore \\boxed{3}.", 0),
        ("(1,2)", "\\boxed{(2, 1)}", 0),
        ("\\sqrt{2}", "\\boxed{sqrt(2)}", 1),
        ("x^{10}", "\\boxed{x^10}", 1),
        ("\\frac{\\pi}{2}", "\\boxed{pi/2}", 1),
        ("3!", "6", 1),
        ("100", "\\boxed{10^2}", 1),
        ("12", "Therefore there are 12 marbles in the box.", 1),
        ("10^{400}", "1", 0),
        ("3", "<think>2</think>\\boxed{3}<|im_end|>", 1),
        ("3", "<think>\\boxed{3}", 0),
    ],
)
def test_grades(math_match, gold, completion, reward):
    assert math_match(Example("?", gold), completion) == reward


@pytest.mark.parametrize("gold", ["\\$18.90", "5 cm", "east", "x+1", "\\{1, 2\\}", "1 1/2"])
def test_right_answers_that_are_understood(math_match, gold):
    math_match.check(Example("?", gold))
    assert math_match(Example("?", gold), f"\\boxed{{{gold}}}") == 1


@pytest.mark.parametrize("gold", ["", " ", None, "&&&", "\\frac{", "$$"])
def test_right_answers_that_are_not_understood_are_refused_before_training(math_match, gold):
    with pytest.raises(ValueError, match="expected an answer that is mathematics or words"):
        math_match.check(Example("?", gold))
