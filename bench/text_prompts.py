"""Prompts over a text, for training: summaries and questions, about what the target wrote itself, so that no text has an owner.

    python bench/text_prompts.py --samples samples.jsonl --output text_prompts.jsonl --without gsm8k_train --without gpteacher_code

samples.jsonl: of `specrt train capture`. Answers of 80 to 600 tokens become texts; text i takes form i of those below in turn. The file is one for `specrt train capture`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from specrt.train.samples import read_samples  # noqa: E402
from specrt.weights import open_checkpoint  # noqa: E402

SUMMARIES = ("Summarize the following text.\n\n{text}", "{text}\n\nSummarize the text above in two or three sentences.", "Write a short summary of this passage:\n\n{text}",
             "What are the main points of the following text?\n\n{text}", "Text: {text}\n\nSummary:", "Give a one-paragraph summary.\n\n\"{text}\"")
QUESTIONS = ("What is this text about?", "What happens in the text?", "Who or what is mentioned in the text?", "What is the most important point?", "Why does it matter, according to the text?",
             "How does the text end?", "List the facts given in the text.", "What does the text say about its subject?")
PASSAGES = ("Answer the question using the passage.\n\nPassage: {text}\n\nQuestion: {question}", "Context:\n{text}\n\nQuestion: {question}\nAnswer:",
            "{text}\n\nBased on the text above, answer: {question}", "Use the following document to answer the question at the end.\n\n{text}\n\n{question}")
SHORTEST, LONGEST = 80, 600  # tokens of a text


def prompts(texts: list[str]) -> list[dict[str, str]]:
    rows = []
    for i, text in enumerate(texts):
        if i % 2:
            question, passage = QUESTIONS[i // 2 % len(QUESTIONS)], PASSAGES[i // 2 // len(QUESTIONS) % len(PASSAGES)]
            rows.append({"source": "text_questions", "prompt": passage.format(text=text, question=question)})
        else:
            rows.append({"source": "text_summaries", "prompt": SUMMARIES[i // 2 % len(SUMMARIES)].format(text=text)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="no texts of this category (may be given several times)")
    a = parser.parse_args()
    source = open_checkpoint(a.model)
    tokenizer = source.tokenizer()
    _, samples = read_samples(a.samples, source.config.vocab_size, source.config.max_position_embeddings)
    answers = [s.ids[s.prompt :] for s in samples if s.category not in a.without]
    texts = [tokenizer.decode(ids).strip() for ids in answers if SHORTEST <= len(ids) <= LONGEST]
    Path(a.output).write_text("".join(json.dumps(row) + "\n" for row in prompts(texts)), encoding="utf-8")
    print(f"{a.output}: {len(texts)} prompts")


if __name__ == "__main__":
    main()
