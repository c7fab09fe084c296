# SPDX-License-Identifier: Apache-2.0
"""Tests extraction of final answers and detection of leaks."""

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
    (r"\fbox{9}", "9"),
    (r"\boxed{\frac{\sqrt{3}}{\sqrt{2}}}", r"\frac{\sqrt{3}}{\sqrt{2}}"),
    (r"\boxed{\text{(B)}}", r"\text{(B)}"),
    (r"\boxed{a} \boxed{ }", "a"),
    ("<answer>42</answer>", "42"),
    ("<think>It is 3.</think><answer>\n(B)\n</answer>", "(B)"),
    ("<solution>1<solution>2</solution>", "2"),
    ("<solution>4</solution> <solution>5", "4"),
    ("<solution>a = 3, so a + 4 = 7</solution>", "a = 3, so a + 4 = 7"),
    ("The final answer is therefore $12$.", "$12$"),
    ("The answer is thus, simply: 12", "12"),
    ("The answer is then equal to 1/2.", "1/2"),
    ("The correct option is (C).", "(C)"),
    ("The correct choice is **B**, because", "B"),
    ("The answer is (a) 12 apples", "(a) 12 apples"),
    ("Answer: yes, since 7 is prime.", "yes"),
    ("ANSWER = -3/4", "-3/4"),
    ("The answer is 1,234,567.89.", "1,234,567.89"),
    ("The answer is .5.", ".5"),
    ("The answer is $3.50!", "$3.50"),
    ("The answer is [0, 1).", "[0, 1)"),
    ("The answer is {1, 2; 3}", "{1, 2"),
    ("#### 1,500", "1,500"),
    ("#### -5\n\n", "-5"),
    ("#### 3\n#### 4", "4"),
    ("####", None),
    ("It weighs 3.14.", "3.14"),
    ("It is 3.14 kg. Done.", "3.14"),
    ("It costs $1,500.", "1,500"),
    (r"about $1.5 \times 10^{3}$", "1.5e3"),
    ("so 10^6 of them", "1e6"),
    (r"that is $2^{10}$", "2^{10}"),
    (r"$\frac{1}{2}$ of it", "1/2"),
    ("a third, 1/3 of it", "1/3"),
    ("5 - 3 = 2", "2"),
    ("a change of \u22127", "-7"),
    ("25 % more", "25 %"),
    ("0.001 is less than 0.004", "0.004"),
    ("1. first\n2. second", "2"),
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
    ("take half of it", "half"),
    ("a ratio of 3 to 4", "3 to 4"),
    (r"it is \pm 2", r"\pm 2"),
    ("that is x + 1", "y = x + 1"),
  ],
)
def test_an_answer_that_is_not_in_the_question_leaks(teaching, answer):
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
