"""model.sig: whose files an export folder holds. Anyone can write sums anew; only who has the private key signs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from export.output_folder import SIGNATURE
from export.progress import one_line


def sign(folder: Path, private_key: Path) -> Path:
    """Writes folder/model.sig over all files of the folder. Write SHA256SUMS before.

    Args:
        private_key: PEM, elliptic (prime256v1, secp384r1 or secp521r1), without a password.

    Raises:
        ValueError: the key cannot be used, or the package is missing.
    """
    signing, _, hashing = _model_signing()
    target = folder / SIGNATURE
    target.unlink(missing_ok=True)  # it would be void, and must not outlive a failure
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # AttributeError: a key of another kind
        raise ValueError(
            f"{private_key}: is no elliptic private key without a password ({one_line(error)}); make one with "
            "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
        ) from None
    config.set_hashing_config(hashing).sign(folder, target)
    return target


def verify(folder: Path, public_key: Path) -> list[str]:
    """What is wrong with folder/model.sig: not there, of another key, or over other files. Empty if it holds.

    Raises:
        ValueError: the public key cannot be read, or the package is missing.
    """
    _, verifying, hashing = _model_signing()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{public_key}: is no elliptic public key ({one_line(error)}); make it with "
            "`openssl ec -in key.pem -pubout -out key.pub`"
        ) from None
    if not (folder / SIGNATURE).is_file():
        return [f"{SIGNATURE}: missing; sign the export, or get it from whoever signed it"]
    try:
        config.set_hashing_config(hashing).verify(folder, folder / SIGNATURE)
    except Exception as error:  # a damaged signature raises whatever the damage leads to
        reason = re.sub(r": Expected .*?digest_value=.*?digest_value=.*?\)\\?'", "", one_line(error))  # names suffice
        return [f"{SIGNATURE}: does not hold for these files and this key ({reason}); get them from their maker"]
    return []


def _model_signing() -> tuple[Any, Any, Any]:
    """Its modules, and what is hashed: all but the signature, .git* too, which the package would leave out."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:  # model-signing 1.1.1 imports pyopenssl and does not declare it
        raise ValueError(f"signatures: {error}; pip install model-signing pyopenssl") from None
    config: Any = hashing.Config
    return signing, verifying, config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
