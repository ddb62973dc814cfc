"""Ask a running `alora serve` through OpenAI's client: python examples/own_data/ask.py [address]

Every task is asked in a chat; the server puts the text into the prompt that the task was trained on.
"""

import sys

from openai import OpenAI

ASKED = {
    "tickets": "Hello, my parcel has not moved since Tuesday.",
    "dates": "Write the date as year-month-day.\n\n17 May 2019",
    "front_desk": "Good evening. Until when is there breakfast?",
    "urgency": "There is smoke in the kitchen.",
}


def main(address: str = "http://127.0.0.1:8000") -> dict[str, str]:
    """Each task's answer."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    served = {model.id for model in client.models.list()}
    answers = {}
    for task, text in ASKED.items():
        if task not in served:
            continue
        reply = client.chat.completions.create(
            model=task, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=40
        )
        answers[task] = reply.choices[0].message.content or ""
        print(f"{task:>10}  {text.splitlines()[-1]}\n{'':>10}  {answers[task]}")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:])
