def build_info() -> dict[str, str | bool | None]: ...
def launch_plan(
    n: int,
    dtype: str = "bfloat16",
    arch: int = 90,
    backward: bool = False,
    grad_dtype: str | None = None,
) -> dict[str, str | int]: ...
