"""Joins within 3 seconds, or says what is wrong and how long it took."""

import time

import ringx

if __name__ == "__main__":
    start = time.monotonic()
    try:
        ringx.launch.init(timeout=3)
        print("met")
    except (RuntimeError, ValueError) as error:
        print(f"{time.monotonic() - start:.2f} {error}")
