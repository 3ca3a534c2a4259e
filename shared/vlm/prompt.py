"""The prompt around the image, taken from the model's own chat template and cut into parts.

The template is rendered once with marks where question and answer go; its text then splits into

    before the image | image | after the image, question, assistant header | answer | end of turn

(several images: all of them before the question, with what the template puts between two of them)

so any family's template serves, and a branch is tokenized as one text: no token boundary differs from an
ordinary prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from shared.errors import DataError, ModelError
from shared.messages import Question
from shared.packing import Branch
from shared.vlm.families import Family

SYSTEM_LINE = "Answer from the picture."
_QUESTION_MARK, _ANSWER_MARK = "QUESTIONPLACE", "ANSWERPLACE"
_CACHED_BRANCHES = 200_000


class Prompt:
    """Turns questions into token ids for one model. Owned by that model's process; not thread-safe.

    image_token: None leaves the image out of the conversation, with everything that the template puts around it;
    the whole text before the question then belongs to the branch.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        family: Family,
        image_token: str | None,
        system_line: str = SYSTEM_LINE,
    ):
        self.tokenizer = tokenizer
        head, between_images = "", ""
        rest = _render(tokenizer, chat_template, system_line, 0 if image_token is None else 1)
        if image_token is not None:
            head, _, rest = rest.partition(image_token)
            head, rest = head + family.before_image, family.after_image + rest
            _, _, after_first = _render(tokenizer, chat_template, system_line, 2).partition(image_token)
            between, _, _ = after_first.partition(image_token)
            between_images = family.after_image + between + family.before_image
        between, _, rest = rest.partition(_QUESTION_MARK)
        header, found, tail = rest.partition(_ANSWER_MARK)
        if not found:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path} does not render image, question and answer in "
                "this order; give the model folder a template that does"
            )
        self.before_image = head
        self._after_image, self._header = between, header
        # LLaVA 1.5's template ends an answer with a space; the model was trained to end it with EOS.
        self._end_of_turn = tail if tail.strip() else str(self.tokenizer.eos_token)
        self.prefix_ids: list[int] = self._with_bos(self._encode(self.before_image))
        self.between_images_ids: list[int] = self._encode(between_images)
        self.after_image_ids: list[int] = self._encode(self._after_image)
        self.digest = hashlib.sha256(
            "\0".join([self.before_image, self._after_image, header, self._end_of_turn]).encode()
        ).hexdigest()[:16]
        self._branches: OrderedDict[Question, Branch] = OrderedDict()

    def branches(self, questions: Sequence[Sequence[Question]]) -> list[list[Branch]]:
        """Token ids of every question, image by image. Raises DataError for an answer without tokens."""
        wanted = {question for row in questions for question in row}
        missing = [question for question in wanted if question not in self._branches]
        found = {question: self._branches[question] for question in wanted if question in self._branches}
        for question, branch in zip(missing, self._encode_branches(missing), strict=True):
            found[question] = self._branches[question] = branch
        while len(self._branches) > _CACHED_BRANCHES:
            self._branches.popitem(last=False)
        return [[found[question] for question in row] for row in questions]

    def opening(self, question: str) -> tuple[tuple[int, ...], int]:
        """Token ids of a question up to where an answer begins, and the token that ends the answer's turn."""
        ((branch,),) = self.branches([[Question(question, "a")]])
        return branch.token_ids[: branch.answer_start], branch.token_ids[-1]

    def _encode_branches(self, questions: Sequence[Question]) -> list[Branch]:
        if not questions:
            return []
        heads = [self._after_image + question.text + self._header for question in questions]
        texts = [h + question.answer + self._end_of_turn for h, question in zip(heads, questions, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        branches = []
        for question, head, ids, offsets in zip(
            questions, heads, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            answer_begin, answer_end = len(head), len(head) + len(question.answer)
            question_end = answer_begin - len(self._header)
            header_start = next((i for i, (_, end) in enumerate(offsets) if end > question_end), len(ids))
            start = next((i for i, (_, end) in enumerate(offsets) if end > answer_begin), len(ids))
            stop = next((i for i, (begin, _) in enumerate(offsets) if begin >= answer_end), len(ids))
            if stop <= start or not question.answer.strip():
                raise DataError(
                    f"answer {question.answer!r} to {question.text!r} has no tokens; correct or drop the record"
                )
            if stop == len(ids):
                raise ModelError("the chat template ends no turn after an answer; give the tokenizer an eos_token")
            branches.append(Branch(tuple(ids[: stop + 1]), start, header_start))
        return branches

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Some templates write the BOS token themselves; the others rely on the tokenizer to add it."""
        probe = self.tokenizer("", add_special_tokens=True)["input_ids"]
        bos = self.tokenizer.bos_token_id
        written = (self.before_image + self._after_image).startswith(self.tokenizer.bos_token or "\0")
        return [bos, *ids] if bos is not None and probe[:1] == [bos] and not written else ids


def _render(tokenizer: Any, chat_template: str, system_line: str, n_images: int) -> str:
    def turn(role: str, *content: dict[str, str]) -> dict[str, Any]:
        return {"role": role, "content": list(content)}

    def words(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    turns = [
        turn("system", words(system_line)),
        turn("user", *([{"type": "image"}] * n_images), words(_QUESTION_MARK)),
        turn("assistant", words(_ANSWER_MARK)),
    ]
    return str(tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False))
