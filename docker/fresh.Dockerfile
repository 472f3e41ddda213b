# A fresh Debian 12 as a newcomer has it, with make and Python and an ordinary user; `make run` installs the rest.
FROM debian:bookworm-slim
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends make python3 \
 && useradd --create-home newcomer
CMD ["sleep", "infinity"]
