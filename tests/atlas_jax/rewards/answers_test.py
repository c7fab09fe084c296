# SPDX-License-Identifier: Apache-2.0
"""Final answers are found, compared exactly, and not given away."""

import pytest

from atlas_jax.rewards import answers


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (r"first \boxed{3}, then \boxed{4}", "4"),
    (r"so \boxed{\frac{1}{2}} <solution>9</solution>", r"\frac{1}{2}"),
    (r"{2 \boxed{\boxed{x_{1}}}} \{", "x_{1}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{7} and a torn \boxed{8", "7"),
    (r"\boxed{} <solution>5</solution>", "5"),
    ("<solution>1</solution> no: <solution> 2 </solution>", "2"),
    ("<solution>x+1</solution>", "x+1"),
    ("<solution>Paris</solution>", "Paris"),
    ("<solution>The answer is 12.</solution>", "12"),
    ("<solution>3 + 4 is seven\n7</solution> or 8", "7"),
    ("<solution></solution> The answer is 6", "6"),
    ("The answer is 3.14.", "3.14"),
    ("The answer is 3.14. That took 2 steps.", "3.14"),
    ("Answer: 1,500 dollars", "1,500 dollars"),
    ("**Final answer:** 42", "42"),
    ("The answer is 5, because 2 + 3 = 5.", "5"),
    ("The answer is 5. Wait, the answer is 6.", "6"),
    ("48 + 24 = 72\n#### 72", "72"),
    ("there are 3 cats and 12 dogs", "12"),
    ("a loss of -4", "-4"),
    ("10-3", "3"),
    ("so it is 1/2 then", "1/2"),
    (r"so $\frac{3}{4}$", "3/4"),
    ("half, or 50% of it", "50%"),
    ("1.5.", "1.5"),
    ("no idea", None),
    ("", None),
  ],
)
def test_extract_finds_the_final_answer(text, expected):
  assert answers.extract(text) == expected


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ("7", "7.0"),
    ("1,500", "1500"),
    (r"1{,}500", "1500"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", ".5"),
    (r"-\dfrac12", "-0.50"),
    (r"3\frac{1}{2}", "3.5"),
    ("3 1/2", "7/2"),
    ("50%", "50 percent"),
    (r"50\%", "0.5"),
    ("$7", "7"),
    ("-$7", "-7"),
    ("7 apples", "7"),
    (r"7\text{ cm}", "7 square cm"),
    (r"\(7\)", "$7$"),
    (r"90^\circ", "90 degrees"),
    ("7.", "7"),
    ("x = 5", "5"),
    ("twelve", "12"),
    ("forty-two apples", "42"),
    ("\u22123", "-3"),
    ("1e3", "1000"),
    ("Paris", " paris. "),
    (r"\text{Yes}", "yes"),
    ("(1, 2)", "(1,2)"),
    ("2/0", "2 / 0"),
    ("9" * 5000, "9" * 5000),
  ],
)
def test_equal_answers_are_equal_both_ways(a, b):
  assert answers.equal(a, b)
  assert answers.equal(b, a)


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ("0.001", "0.004"),
    ("0.333", "1/3"),
    ("0.1", "0.10000000000000000001"),
    ("50%", "50"),
    ("12", "112"),
    ("-7", "7"),
    ("2x", "2"),
    (r"2\pi", "2"),
    ("5 million", "5"),
    ("3 and a half", "3"),
    ("1/0", "1"),
    ("9" * 5000, "9"),
    ("Paris", "Lyon"),
    ("", ""),
    ("$", "."),
  ],
)
def test_different_answers_differ(a, b):
  assert not answers.equal(a, b)
  assert not answers.equal(b, a)


@pytest.mark.parametrize(
  ("teaching", "answer"),
  [
    ("You should get 1,500.", "1500"),
    ("It is twelve of them.", "12"),
    ("twenty-one, I think", "21"),
    ("5+7=12", "12"),
    ("add to x=12 apples", "12"),
    ("that makes 12.0", "12"),
    ("that makes 24/2", "12"),
    ("it is 0.5", "1/2"),
    (r"it is \frac{1}{2}", "0.5"),
    ("go for 50 percent", "50%"),
    ("the value 50", "50%"),
    ("think of paris, the capital", "Paris"),
    ("choose B", "B"),
    ("seen 10,11,12", "12 apples"),
  ],
)
def test_an_answer_that_the_question_lacks_leaks(teaching, answer):
  assert answers.leaks(teaching, "How many are 5 and 7?", answer)


@pytest.mark.parametrize(
  ("teaching", "answer"),
  [
    ("Use all 112 of them.", "12"),
    ("Use 12.5 and 3.12 and 1,200.", "12"),
    ("Add 5 and 7.", "12"),
    ("See section 3.1.42.", "2"),
    ("Note the parisian style.", "Paris"),
    ("Take a look.", "A"),
    ("Add the two numbers.", ""),
  ],
)
def test_other_words_and_numbers_do_not_leak(teaching, answer):
  assert not answers.leaks(teaching, "How many are 5 and 7?", answer)


@pytest.mark.parametrize(
  ("teaching", "leaked"),
  [
    ("Compare 12 with 9 first.", False),
    ("Start from twelve.", False),
    ("The answer is 12.", True),
    ("The Answer: **12**", True),
    ("The larger one is twelve.", True),
    ("3 * 4 = $12", True),
    (r"\boxed{12}", True),
    ("<solution> 12", True),
  ],
)
def test_an_answer_in_the_question_leaks_only_if_announced(teaching, leaked):
  assert answers.leaks(teaching, "Which is larger, 12 or 9?", "12") == leaked
