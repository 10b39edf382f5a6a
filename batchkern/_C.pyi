from typing import Any

def build_facts() -> dict[str, Any]: ...
def cuda_problem(device: int) -> str: ...  # only where build_facts()["cuda"]
